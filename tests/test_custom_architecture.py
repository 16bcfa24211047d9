"""One's own architecture: the example of the docs is trained, saved and loaded; only the caller
names a class.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from saezoo_train import train_sae
from saezoo_train.architectures import ARCHITECTURES, Setting
from saezoo_train.architectures.custom import load_architecture

from saezoo.check import check_sae
from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.errors import ConfigError, FormatError
from saezoo.formats import native
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.sae import SAE
from tests.tiny_host import recipe, write_host, write_texts

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = DOCS / "examples"
D, M, SCALE, STEPS = 6, 48, 0.2, 200


@pytest.fixture(autouse=True)
def no_traces():
    """What a test imports from its folder is forgotten after it."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith(("torch", "saezoo")):
            del sys.modules[name]


def raw(seed):
    directions = torch.randn(12, D, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(64, 12, generator=generator) < 0.15
    return (on * torch.rand(64, 12, generator=generator)) @ directions * 5 + 1


def trained(cls, steps=STEPS, **options):
    x = torch.cat([raw(10**6 + at) for at in range(10)]) * SCALE
    variance = float((x - x.mean(0)).square().sum(1).mean())
    setting = Setting(x.mean(0), variance, SCALE, x, STEPS, 64, 0)
    model = cls(cls.Options(**{"d_sae": M} | options), setting)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    outputs = []
    for step in range(steps):
        output = model.training_step(raw(step) * SCALE, step)
        adam.zero_grad()
        output.loss.backward()
        model.before_update()
        adam.step()
        model.after_update()
        outputs.append(output)
    return model, outputs


def saved(model, folder):
    """The folder that the trainer writes."""
    folder.mkdir()
    native.write(*model.export({"notes": {"from": "a test"}}), folder)
    return folder


def test_the_docs_show_the_example_as_it_is():
    page = (DOCS / "your-own-architecture.md").read_text(encoding="utf-8")
    assert (EXAMPLES / "my_sae.py").read_text(encoding="utf-8") in page


@pytest.mark.parametrize("name", ["SquaredSAE", "ShiftedSAE"])
def test_the_example_learns(name):
    _, outputs = trained(load_architecture(f"my_sae:{name}", EXAMPLES))
    assert float(outputs[-1].fvu) < 0.35 < float(outputs[0].fvu)
    assert 0 < float(outputs[-1].l0) < float(outputs[0].l0)


def test_what_has_a_named_form_is_loaded_by_anyone(tmp_path):
    model, _ = trained(load_architecture("my_sae:ShiftedSAE", EXAMPLES), 20, shift=0.05)
    sae = load_sae(saved(model, tmp_path / "out"))
    assert sae.cfg.architecture == "relu"
    assert sae.cfg.notes == {"from": "a test"}
    x = raw(7)
    assert close(sae(x), model(x).detach())
    assert float(sae.encode(x).count_nonzero()) > 0
    with pytest.raises(ConfigError, match="relu, which saezoo computes itself: leave out custom="):
        load_sae(tmp_path / "out", custom=type(model))


def test_what_has_none_is_loaded_only_with_the_class(tmp_path):
    cls = load_architecture("my_sae:SquaredSAE", EXAMPLES)
    model, _ = trained(cls, 20, sparsity=0.01)
    folder = saved(model, tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    assert written["architecture"] == "custom"
    assert written["custom"]["name"] == "my_sae:SquaredSAE"
    del sys.modules["my_sae"]
    with pytest.raises(ConfigError, match=r"'my_sae:SquaredSAE'.*load_sae\(…, custom=TheClass\)"):
        load_sae(folder)
    assert "my_sae" not in sys.modules
    again = load_sae(folder, custom=cls)
    x = raw(7)
    assert torch.equal(again(x), model(x))
    assert again.options == model.options
    assert not again.training
    assert not any(value.requires_grad for value in again.parameters())
    assert load_sae(folder, custom=cls, dtype=torch.float64).W_dec.dtype == torch.float64


def test_any_class_with_from_native_will_do(tmp_path):
    model, _ = trained(load_architecture("my_sae:SquaredSAE", EXAMPLES), 2)
    folder = saved(model, tmp_path / "out")

    class Mine:
        @classmethod
        def from_native(cls, cfg, tensors):
            return cfg.custom.options["scale"], sorted(tensors)

    assert load_sae(folder, custom=Mine) == (SCALE, ["W_dec", "W_enc", "b_dec", "b_enc"])
    with pytest.raises(ConfigError, match="no classmethod from_native"):
        load_sae(folder, custom=dict)
    other = ARCHITECTURES["topk"]
    with pytest.raises(ConfigError, match="not what TopK wrote: sparsity: Extra inputs"):
        load_sae(folder, custom=other)


def test_a_built_in_architecture_goes_through_export_by_its_name(tmp_path):
    model, _ = trained(ARCHITECTURES["topk"], 2, k=3)
    assert load_sae(saved(model, tmp_path / "out")).cfg.architecture == "topk"


def test_buffers_of_whole_numbers_and_scalars_are_part_of_it(tmp_path):
    cls = load_architecture("my_sae:SquaredSAE", EXAMPLES)

    class Counting(cls):
        def __init__(self, options, setting):
            super().__init__(options, setting)
            self.register_buffer("seen", torch.tensor(0))

        def training_step(self, x, step):
            self.seen += len(x)
            return super().training_step(x, step)

    model, _ = trained(Counting, 3)
    again = load_sae(saved(model, tmp_path / "out"), custom=Counting, dtype=torch.float64)
    assert int(again.seen) == 192
    assert again.seen.dtype == torch.int64


def changed(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        place, _, inner = key.partition("__")
        if inner:
            data[place][inner] = value
        else:
            data[place] = value
    data = {key: value for key, value in data.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"custom": None}, ConfigError, "go together"),
        ({"architecture": "relu"}, ConfigError, "go together"),
        ({"k": 3}, ConfigError, "custom has no k"),
        ({"custom__tensors": {"W_dec": [M, D]}}, FormatError, "tensors that custom does not have"),
        ({"custom__tensors": {"W_dec": [M, -D]}}, ConfigError, "greater than 0"),
        ({"custom__options": {"d_sae": M}}, ConfigError, "no number `scale`"),
        ({"custom__options": {"d_sae": M + 1, "scale": 1}}, ConfigError, "not what SquaredSAE"),
        ({"custom__run": "rm"}, ConfigError, "custom.run"),
    ],
)
def test_a_folder_that_lies_is_refused(tmp_path, changes, error, complaint):
    cls = load_architecture("my_sae:SquaredSAE", EXAMPLES)
    folder = changed(saved(trained(cls, 1)[0], tmp_path / "out"), **changes)
    with pytest.raises(error, match=complaint) as caught:
        load_sae(folder, custom=cls)
    assert "\n" not in str(caught.value)


def test_nothing_else_of_the_library_computes_with_it(tmp_path):
    model, _ = trained(load_architecture("my_sae:SquaredSAE", EXAMPLES), 1)
    folder = saved(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="pass its class"):
        SAE(native.read_config(folder))
    with pytest.raises(ConfigError, match="pass its class"):
        convert_sae(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    # its files can be checked, what it computes cannot
    *others, finding = check_sae(folder)
    assert all(other.ok is not False for other in others)
    assert finding.ok is None
    assert "only its author's class knows" in finding.detail
    cfg = SAEConfig.from_json(native.read_config(folder).to_json())
    assert cfg == native.read_config(folder)


GOOD = (EXAMPLES / "my_sae.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("my_sae", GOOD, "write module:Class"),
        ("my_sae:", GOOD, "write module:Class"),
        ("../my_sae:SquaredSAE", GOOD, "write module:Class"),
        ("my_sae:a.b", GOOD, "write module:Class"),
        (
            "nowhere:SquaredSAE",
            GOOD,
            "no nowhere; nowhere.py should lie beside the recipe in",
        ),
        ("mine:Squared", GOOD, "no Squared in .*it has SquaredSAE, ShiftedSAE"),
        ("mine:Any", "", "it has no Architecture at all"),
        ("mine:Spec", GOOD, "Spec is no subclass"),
        ("mine:Architecture", GOOD, "Architecture is no subclass"),
        ("mine:X", "def broken(:\n", "mine.py, line 1: "),
        ("mine:X", "import no_such_package\n", "importing it fails: No module named 'no_such"),
        (
            "mine:X",
            "from saezoo_train.architectures import Architecture\nclass X(Architecture): pass\n",
            "give X a class Options",
        ),
        (
            "mine:X",
            "from saezoo.config import Spec\nfrom saezoo_train.architectures import Architecture\n"
            "class X(Architecture):\n  class Options(Spec): pass\n",
            "X has no training_step",
        ),
        ("json:X", "", "a module json is there already"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(tmp_path, name, text, complaint):
    module = name.partition(":")[0]
    if module in ("mine", "json"):
        (tmp_path / f"{module}.py").write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_architecture(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_two_recipes_with_modules_of_one_name_are_not_mixed_up(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(GOOD)
    load_architecture("mine:SquaredSAE", tmp_path / "first")
    with pytest.raises(ConfigError, match="mine is there already.*rename the one in"):
        load_architecture("mine:SquaredSAE", tmp_path / "second")


def test_a_module_may_be_a_package_or_installed_and_import_its_neighbours(tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").write_text("")
    (tmp_path / "lab" / "mine.py").write_text("import helper\n" + GOOD)
    (tmp_path / "helper.py").write_text("")
    assert load_architecture("lab.mine:SquaredSAE", tmp_path).__name__ == "SquaredSAE"
    installed = load_architecture("saezoo_train.architectures.topk:TopK", tmp_path)
    assert installed is ARCHITECTURES["topk"]


@pytest.mark.parametrize("name", ["SquaredSAE", "ShiftedSAE"])
@pytest.mark.usefixtures("one_thread")
def test_a_recipe_beside_the_file_trains_it_to_a_folder_with_a_readme(name, tmp_path):
    host = write_host(tmp_path / "host")
    texts = write_texts(tmp_path / "docs.jsonl", 60)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own_example.py").write_text(GOOD)
    made = recipe(host, texts, architecture=f"own_example:{name}", train_tokens=64 * 10)
    path = tmp_path / "mine" / "recipe.yaml"
    path.write_text(yaml.safe_dump(made | {"sae": {"d_sae": 48}}))
    done = train_sae(path, tmp_path / "out")
    readme = (done.folder / "README.md").read_text()
    if name == "ShiftedSAE":
        assert load_sae(done.folder).cfg.architecture == "relu"
        assert 'load_sae("./tiny")' in readme
        return
    cls = load_architecture("own_example:SquaredSAE", tmp_path / "mine")
    sae = load_sae(done.folder, custom=cls)
    assert sae(torch.randn(3, sae.setting.mean_D.shape[0])).isfinite().all()
    assert "from own_example import SquaredSAE" in readme
    assert 'load_sae("./tiny", custom=SquaredSAE)' in readme
    assert "golden" not in readme
    with pytest.raises(ConfigError, match="pass its class"):
        load_sae(done.folder)
