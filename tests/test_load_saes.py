"""Several SAEs at once: one of each layer, or an error that says what to ask for."""

import pytest

from saezoo import SAE, SAEConfig, save_sae
from saezoo.cli import main
from saezoo.errors import AmbiguousName, UnknownSAE
from saezoo.load import load_saes
from saezoo.search import find_all, what_narrows, what_widens


@pytest.fixture
def layers(tmp_path, registry_at):
    """A registry with layers 0 to 2 of one model in two widths, on this machine."""
    for layer in range(3):
        for d_sae in (8, 16):
            cfg = SAEConfig(architecture="relu", d_in=4, d_sae=d_sae)
            save_sae(SAE(cfg), tmp_path / f"l{layer}-{d_sae}")
    folder = tmp_path / "registry"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"""release: mine
about: x
shared: {{format: native, source: {tmp_path}, site: {{model: org/m, point: resid_post}}}}
families:
- id: l{{layer}}-{{width}}
  each: {{layer: 0..2, width: [8, 16]}}
  facts: {{path: "l{{layer}}-{{width}}", d_sae: "{{width}}", site: {{layer: "{{layer}}"}}}}
"""
    )
    registry_at(folder)


@pytest.mark.usefixtures("layers")
def test_one_sae_of_each_layer_is_loaded():
    assert list(load_saes("m", width=16)) == [0, 1, 2]
    chosen = load_saes(model="org/m", layers=[2, 0], site="resid_post", width=8)
    assert list(chosen) == [0, 2]
    assert {sae.d_sae for sae in chosen.values()} == {8}
    assert chosen[2].cfg.site.layer == 2


@pytest.mark.usefixtures("layers")
def test_what_fits_twice_or_not_at_all_is_said_before_anything_is_fetched():
    with pytest.raises(AmbiguousName, match=r"layer 0 has 2 SAEs.*width: 8, 16"):
        load_saes("m")
    with pytest.raises(UnknownSAE, match="layer 7"):
        load_saes("m", [1, 7], width=8)
    with pytest.raises(UnknownSAE, match="'n'"):
        load_saes("n")


@pytest.mark.usefixtures("layers")
def test_searches_say_what_narrows_and_what_widens_them(capsys):
    assert what_narrows(find_all().rows) == "width: 8, 16; layer: 0, 1, 2"
    filters = {"model": "m", "layer": 1, "width": 9, "site": None}
    assert what_widens(filters) == "2 without width"
    with pytest.raises(SystemExit):
        main(["list", "--model", "m", "--width", "9"])
    assert "6 without width" in capsys.readouterr().out
