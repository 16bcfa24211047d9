"""Checkpoints with a pickled config object: its fields are read, and whatever else a pickle asks
for is refused or stays inert. The bombs are real: unpickled by the trusting, each makes a folder.
"""

import builtins
import collections
import copyreg
import functools
import io
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import zipfile

import numpy
import pytest
import torch

from saezoo.errors import FormatError, SaezooError, UnsafeFile
from saezoo.formats import _pickled, detect
from saezoo.formats._pickled import Inert, named_classes, read_config, read_pickled, tensor_names
from saezoo.formats._tensors import read_pickle
from saezoo.load import load_sae
from tests.origins import dunefsky, prisma
from tests.origins._classes import classes_of, filled
from tests.origins._origin import D, N

CLASS = dunefsky.CLASS


def whole(origin=dunefsky.ORIGINS[0]):
    return origin.tensors(torch.Generator().manual_seed(0))


def with_pickle(path, data):
    """A checkpoint whose pickle is replaced by these bytes; its tensors stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": whole()}, path)
    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, data if name.endswith("data.pkl") else body)
    return path


class Reduces:
    """Unpickled, calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Sets:
    """Unpickled, makes an object of a class by a call and sets its state."""

    def __init__(self, function, arguments, state):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


def bombs(folder):
    """name -> an object that, unpickled, makes `folder` (or opens or imports something)."""
    make = f"__import__('os').mkdir({str(folder)!r})"
    return {
        "posix.mkdir": Reduces(os.mkdir, str(folder)),
        "posix.system": Reduces(os.system, f"mkdir {folder}"),
        "eval": Reduces(eval, make),
        "exec": Reduces(exec, make),
        "__import__": Reduces(__import__, "antigravity"),
        "getattr": Reduces(getattr, "", "format"),
        "open": Reduces(open, str(folder), "w"),
        "subprocess": Reduces(subprocess.call, ["mkdir", str(folder)]),
        "partial": Reduces(functools.partial, os.mkdir, str(folder)),
        "map": Reduces(map, os.mkdir, [str(folder)]),
        "pickle.loads": Reduces(pickle.loads, pickle.dumps(Reduces(os.mkdir, str(folder)))),
        "torch.load": Reduces(torch.load, str(folder)),
        "torch.hub": Reduces(torch.hub.load, "org/repo", "model"),
        "torch.nn.Module": Reduces(torch.nn.Linear, 2, 2),
        "torch.jit": Reduces(torch.jit.load, str(folder)),
        "copyreg": Reduces(copyreg._reconstructor, Reduces, object, None),
        "numpy.load": Reduces(numpy.load, str(folder), None, True),
        "numpy.frombuffer": Reduces(numpy.frombuffer, b"12345678"),
        "defaultdict": collections.defaultdict(functools.partial(os.mkdir, str(folder))),
        "type": Reduces(type, "Made", (), {}),
        "setattr": Reduces(setattr, "", "x", 1),
        "exit": Reduces(sys.exit, 3),
        "print": Reduces(builtins.print, "boom"),
        "BUILD": Sets(os.mkdir, (str(folder),), {"x": 1}),
    }


PLACES = {
    "as the config": lambda bomb, _kind: {"cfg": bomb, "state_dict": whole()},
    "in the config": lambda bomb, kind: {
        "cfg": filled(kind, dunefsky.CONFIG | {"note": bomb}),
        "state_dict": whole(),
    },
    "deep in the config": lambda bomb, kind: {
        "cfg": filled(kind, dunefsky.CONFIG | {"more": [{"a": (bomb,)}]}),
        "state_dict": whole(),
    },
    "in the state dict": lambda bomb, kind: {
        "cfg": filled(kind, dunefsky.CONFIG),
        "state_dict": whole() | {"W_enc": bomb},
    },
    "beside both": lambda bomb, kind: {
        "cfg": filled(kind, dunefsky.CONFIG),
        "state_dict": whole(),
        "more": bomb,
    },
    "alone": lambda bomb, _kind: bomb,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", bombs("x"))
def test_a_bomb_is_refused_wherever_it_lies_and_never_goes_off(name, place, tmp_path, capsys):
    file = tmp_path / "sae.pt"
    with classes_of(CLASS) as (kind,):
        torch.save(PLACES[place](bombs(tmp_path / "made")[name], kind), file)
    before = set(sys.modules)
    for form in ("dunefsky", "prisma"):
        with pytest.raises(UnsafeFile) as caught:
            load_sae(file, format=form)
        assert "more than tensors" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FormatError):
        load_sae(file)
    assert not (tmp_path / "made").exists()
    assert not {"antigravity", "sae_training"} & (set(sys.modules) - before)
    assert capsys.readouterr().out == ""


NAMED = ["os", "posix", "nt", "sys"]


@pytest.mark.parametrize("module", NAMED)
def test_names_that_pickle_would_import_are_refused_in_hand_written_pickles_too(module, tmp_path):
    data = f"\x80\x02c{module}\nsystem\nX\x04\x00\x00\x00true\x85R.".encode("latin-1")
    with pytest.raises(UnsafeFile, match=f"{module}.system"):
        read_pickled(with_pickle(tmp_path / "sae.pt", data))


WRITTEN = {
    # opcodes that torch's own unpickler has not: INST, OBJ, STACK_GLOBAL, NEWOBJ_EX, EXT1, PERSID
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "NEWOBJ_EX": b"\x80\x04cpkg.mod\nConfig\n)}\x92.",
    "EXT1": b"\x80\x02\x82\x01.",
    "PERSID": b"Pstorage\n.",
    "a name with a dot at the end": b"\x80\x02cos.path\njoin\n)R.",
    "a name of two lines": b"\x80\x02cpkg\nos\nsystem\n)R.",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_pickles_written_by_hand_are_refused(name, tmp_path):
    with pytest.raises(FormatError) as caught:
        read_pickled(with_pickle(tmp_path / "sae.pt", WRITTEN[name]))
    assert "\n" not in str(caught.value)


def inert(*parts):
    """A pickle that makes an object of an author's class, then goes on with these opcodes."""
    return b"\x80\x02cpkg.mod\nConfig\n" + b"".join(parts) + b"."


WORD = b"X\x01\x00\x00\x00a"
STATES = {
    "no state": (b")\x81", {}),
    "made by a call": (b")R", {}),
    "made by a call with arguments": (b"(K\x01K\x02" + WORD + b"tR", {}),
    "a dict": (b")\x81}" + WORD + b"K\x01sb", {"a": 1}),
    "a tuple of dict and slots": (b")\x81N}X\x09\x00\x00\x00__class__K\x01s\x86b", {}),
    "a name that is none": (b")\x81}K\x07K\x01sb", {}),
    "dunders are but words": (
        b")\x81}X\x09\x00\x00\x00__class__K\x01sX\x0a\x00\x00\x00__reduce__K\x02sb",
        {"__class__": 1, "__reduce__": 2},
    ),
    "a number as the state": (b")\x81K\x07b", {}),
    "twice": (b")\x81}" + WORD + b"K\x01sb}" + WORD + b"K\x02sb", {"a": 2}),
}


@pytest.mark.parametrize("name", STATES)
def test_an_inert_object_keeps_plain_fields_and_nothing_else(name, tmp_path):
    opcodes, fields = STATES[name]
    made = read_pickled(with_pickle(tmp_path / "sae.pt", inert(opcodes)))
    assert type(made) is Inert
    assert made.fields == fields
    assert not hasattr(made, "__dict__")
    assert read_config(made, "cfg", tmp_path) == fields


CALLS = {
    "the object called": inert(b")\x81)R"),
    "the object as a class": inert(b")\x81)\x81"),
    "a field called": inert(b")\x81}", WORD, b"K\x01sb", WORD, b"\x85R"),
    "set like a dict": inert(b")\x81", WORD, b"K\x01s"),
    "appended to": inert(b")\x81K\x01a"),
    "rebuilt as a tensor's subclass": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cpkg.mod\nConfig\ncpkg.mod\nConfig\n)}tR)R."
    ),
    "as the storage of a tensor": (
        b"\x80\x02(X\x07\x00\x00\x00storagecpkg.mod\nConfig\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."
    ),
    "as a wrapper subclass": (
        b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n(cpkg.mod\nConfig\nNNNNNNNNtR."
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_inert_object_answers_to_nothing(name, tmp_path):
    with pytest.raises(FormatError) as caught:
        read_pickled(with_pickle(tmp_path / "sae.pt", CALLS[name]))
    assert "\n" not in str(caught.value)


REAL = {
    "collections.OrderedDict": (b"\x80\x02ccollections\nOrderedDict\n)R.", collections.OrderedDict),
    "torch.Size": (b"\x80\x02ctorch\nSize\n(K\x02K\x03t\x85R.", torch.Size),
    "torch.device": (b"\x80\x02ctorch\ndevice\nX\x03\x00\x00\x00cpu\x85R.", torch.device),
    "torch.float32": (b"\x80\x02ctorch\nfloat32\n.", torch.dtype),
}


@pytest.mark.parametrize("name", REAL)
def test_what_torch_knows_is_never_inert(name, tmp_path):
    data, kind = REAL[name]
    both = b"\x80\x02(" + data[2:-1] + b"cpkg.mod\nConfig\n)\x81t."
    known, other = read_pickled(with_pickle(tmp_path / "sae.pt", both))
    assert isinstance(known, kind)
    assert type(other) is Inert


def test_the_table_of_torch_is_as_it_was_after_a_read_good_or_bad(tmp_path):
    before = torch.serialization.get_safe_globals()
    read_pickled(dunefsky.writer()(tmp_path / "good", whole()))
    with pytest.raises(FormatError):
        read_pickled(with_pickle(tmp_path / "bad.pt", CALLS["the object called"]))
    assert torch.serialization.get_safe_globals() == before
    # and so a plain read does not take what was inert a moment ago
    with pytest.raises(UnsafeFile):
        read_pickle(tmp_path / "good" / dunefsky.NAME)


def test_reads_at_the_same_time_do_not_lend_their_classes_to_each_other(tmp_path):
    ours = dunefsky.writer("ours.Config")(tmp_path / "ours", whole())
    same = dunefsky.writer("ours.Config")(tmp_path / "same", whole())
    seen = []

    def read(function, path):
        for _ in range(20):
            try:
                seen.append((function, type(function(path)["cfg"])))
            except UnsafeFile:
                seen.append((function, None))

    jobs = [(read_pickled, ours), (read_pickled, same), (read_pickle, ours)]
    threads = [threading.Thread(target=read, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {(read_pickled, Inert), (read_pickle, None)}


def test_a_file_that_changes_between_the_look_and_the_read_is_refused(tmp_path, monkeypatch):
    path = dunefsky.writer()(tmp_path, whole())
    other = dunefsky.writer("another.Config")(tmp_path / "other", whole())
    look = named_classes

    def change(*args):
        names = look(*args)
        path.write_bytes(other.read_bytes())
        return names

    monkeypatch.setattr(_pickled, "named_classes", change)
    with pytest.raises(UnsafeFile, match="another.Config"):
        read_pickled(path)


def test_paths_and_numbers_of_numpy_in_a_config_do_no_harm(tmp_path):
    path = dunefsky.writer(where=pathlib.Path("x"))(tmp_path, whole())
    assert load_sae(path).d_sae == N
    numbers = dunefsky.writer(l1_coefficient=numpy.float64(0.5))(tmp_path / "b", whole())
    assert load_sae(numbers).d_sae == N


LARGE = {
    "many classes": b"\x80\x02(" + b"".join(b"cpkg.m%d\nC\n" % n for n in range(40)) + b"t.",
    "a long pickle": b"\x80\x02(" + b"]" * (5 * 2**20) + b"t.",
}


@pytest.mark.parametrize("name", LARGE)
def test_more_than_any_config_has_is_refused(name, tmp_path):
    with pytest.raises(UnsafeFile, match="more than the"):
        read_pickled(with_pickle(tmp_path / "sae.pt", LARGE[name]))


def doubled(levels=60):
    """A list of twice the list before, 60 deep: small in memory, endless for who walks it."""
    made = [1]
    for _ in range(levels):
        made = [made, made]
    return made


def test_lists_that_hold_each_twice_the_one_before_are_no_work_and_no_message(tmp_path):
    loop = []
    loop.append(loop)
    for value in (doubled(), loop):
        torch.save({"more": value}, tmp_path / "plain.pt")
        read_pickle(tmp_path / "plain.pt")
        path = dunefsky.writer(d_in=value)(tmp_path / str(len(value)), whole())
        with pytest.raises(FormatError) as caught:
            load_sae(path)
        assert str(caught.value).endswith("d_in is an object, expected a positive whole number")
        (path.parent / dunefsky.NAME).unlink()
        path.parent.rmdir()


def test_long_words_and_deep_values_of_a_config_are_left_out():
    fields = {"a": "x" * 2000, "b": {"c": {"d": 1}, "e": [1], "f": 2}, "g": None, 5: 1, "h": 1.5}
    plain = _pickled.plain_fields(fields)
    assert plain["g"] is None
    assert plain["h"] == 1.5
    assert plain["b"]["f"] == 2
    assert all(type(value) is Inert for value in (plain["a"], plain["b"]["c"], plain["b"]["e"]))
    assert set(plain) == {"a", "b", "g", "h"}


def test_a_checkpoint_of_before_torch_1_6_is_read_as_long_as_it_names_no_class(tmp_path):
    torch.save(whole(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_pickled(tmp_path / "old.pt").keys() == whole().keys()
    with classes_of(CLASS) as (kind,):
        saved = {"cfg": filled(kind, {}), "state_dict": whole()}
        torch.save(saved, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFile, match="more than tensors"):
        read_pickled(tmp_path / "old.pt")


def test_names_in_a_checkpoint_are_seen_through_a_pickled_config(tmp_path):
    names = tensor_names(dunefsky.writer()(tmp_path, whole()))
    assert {"cfg", "state_dict", "hook_point", "W_enc", "b_dec_out"} <= names
    assert tensor_names(with_pickle(tmp_path / "x.pt", WRITTEN["INST"])) is None


def test_nothing_is_imported_for_a_config_of_a_package_that_is_there(tmp_path):
    """In a process of its own: a package of the class's name lies on the path, and would tell."""
    (tmp_path / "telltale").mkdir()
    (tmp_path / "telltale" / "__init__.py").write_text("print('imported')\nclass Config: pass\n")
    path = dunefsky.writer("telltale.Config")(tmp_path / "sae", whole())
    code = f"from saezoo import load_sae; print(load_sae({str(path)!r}).d_in)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == f"{D}\n", done.stderr


def test_format_of_each_checkpoint_with_a_config_is_told_by_its_content(tmp_path):
    assert detect(dunefsky.ORIGINS[0].write(tmp_path / "a", whole())) == "dunefsky"
    folder = prisma.ORIGINS[0].write(tmp_path / "b", whole(prisma.ORIGINS[0]))
    assert detect(folder) == detect(folder / "weights.pt") == "prisma"
    (folder / "config.json").unlink()
    # its own config says more than Dunefsky's code knows of
    with pytest.raises(FormatError, match="format='prisma'"):
        load_sae(folder / "weights.pt")
    assert load_sae(folder / "weights.pt", format="prisma").d_sae == N


def test_bytes_of_any_kind_in_place_of_the_pickle_end_in_an_error(tmp_path):
    generator = torch.Generator().manual_seed(0)
    whole_pickle = io.BytesIO()
    with classes_of(CLASS) as (kind,):
        torch.save({"cfg": filled(kind, dunefsky.CONFIG), "state_dict": whole()}, whole_pickle)
    with zipfile.ZipFile(whole_pickle) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    done = 0
    for _ in range(300):
        raw = bytearray(data)
        for place in torch.randint(0, len(raw), (3,), generator=generator).tolist():
            raw[place] = int(torch.randint(0, 256, (1,), generator=generator))
        path = with_pickle(tmp_path / "sae.pt", bytes(raw))
        try:
            sae = load_sae(path, format="dunefsky")
        except SaezooError:
            done += 1
        else:
            assert sae.W_enc.shape == (sae.d_in, sae.d_sae)
    assert done > 50
