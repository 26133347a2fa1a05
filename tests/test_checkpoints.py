"""Checkpoints: what is saved comes back, and whatever is no checkpoint of ours is refused in one sentence."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from truths.fields import one_sentence

from regteach import checkpoints
from regteach.affine import AffineBounds
from regteach.checkpoints import FORMAT, Model, available, load, save_model
from regteach.grid import Grid
from regteach.nets.istn import ISTN, RIGID, AffineStage, ISTNConfig, SplineStage, count_parameters, public
from regteach.refinement import Refinement

GRIDS = {2: Grid((32, 29), (1.0, 1.5), (-10.0, 3.0)), 3: Grid((16, 12, 18), (1.0, 1.5, 2.0), (-10.0, 3.0, 5.5))}
AFFINE = AffineStage(AffineBounds(7.0, 20.0, 1.3, 10.0, 0.1), widths=(4, 8), hidden=8)
CONFIGS = {
    "2d": ISTNConfig(GRIDS[2], (AFFINE, SplineStage(6.0, 2.5, (4, 8))), channels=2, structures=3, itn=(4, 6)),
    "3d": ISTNConfig(GRIDS[3], (AffineStage(RIGID, (4, 8), 8), SplineStage(8.0, widths=(4, 8))), itn=(4, 6), shrink=2),
    "no ITN": ISTNConfig(GRIDS[2], (AFFINE,), itn=(), normalise=False),
    "public": public(Grid((64, 64)), "affine"),
}
CARD = {"recipe": {"data": "trees", "seed": 3}, "dice": {"refined": 0.975}, "notes": ["é", "line\nbreak"]}


def made(name: str = "2d", **more) -> Model:
    torch.manual_seed(1)
    network = ISTN(CONFIGS[name])
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Model(f"istn-{name}", network, Refinement(17, rate=0.02, bending=3.0, focus_mm=4.0), CARD, **more)


def images(config: ISTNConfig) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.rand(2, 1, config.channels, *config.grid.shape)
    return first, second


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tmp_path / "istn.safetensors", made())


# ---- there and back ----


@pytest.mark.parametrize("name", list(CONFIGS))
def test_everything_comes_back(name: str, tmp_path: Path) -> None:
    model = made(name)
    back = load(save_model(tmp_path / "m.safetensors", model))
    assert (back.name, back.refinement, back.card) == (model.name, model.refinement, model.card)
    assert back.network.config == model.network.config == CONFIGS[name]
    assert back.grid == CONFIGS[name].grid
    assert isinstance(back.grid.shape, tuple)
    for key, value in model.network.state_dict().items():
        torch.testing.assert_close(back.network.state_dict()[key], value.half().float(), rtol=0, atol=0)
    assert not back.network.training
    assert not any(p.requires_grad for p in back.network.parameters())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_transform_is_that_of_the_rounded_weights(name: str, tmp_path: Path) -> None:
    model = made(name)
    back = load(save_model(tmp_path / "m.safetensors", model))
    rounded = model.network.half().float().eval()
    pair = images(CONFIGS[name])
    with torch.no_grad():
        ours, theirs = back.network(*pair, back.grid), rounded(*pair, back.grid)
    field, truth = (r.transform.displacement_on(back.grid) for r in (ours, theirs))
    assert truth.abs().max() > 0.1
    torch.testing.assert_close(field, truth, rtol=0, atol=1e-3)


def test_a_file_is_half_precision_and_its_card_can_be_read_without_us(saved: Path) -> None:
    weights = load_file(saved)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert saved.stat().st_size < 2 * count_parameters(made().network) + 40_000
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    assert header["format"] == FORMAT
    assert json.loads(header["card"]) == CARD


def test_saving_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = made()
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    save_model(tmp_path / "m.safetensors", model)
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    assert all(value.dtype == torch.float32 for value in model.network.state_dict().values())


def test_whoever_may_read_other_files_may_read_a_checkpoint(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    path = save_model(tmp_path / "m.safetensors", made())
    assert path.stat().st_mode == other.stat().st_mode


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved: Path, monkeypatch) -> None:
    old = saved.read_bytes()

    whole = Path.write_bytes

    def half(path: Path, data: bytes) -> None:
        whole(path, data[: len(data) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(ValueError) as caught:
        save_model(saved, dataclasses.replace(made(), name="other"))
    assert one_sentence(caught.value, "can not be written", "the disk is full")
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_to_moves_the_network_and_returns_the_model() -> None:
    model = made()
    assert model.to("meta") is model
    assert {p.device.type for p in model.network.parameters()} == {"meta"}


# ---- names ----


def test_models_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    for name in ("istn-trees", "istn-brains"):
        save_model(tmp_path / f"{name}.safetensors", dataclasses.replace(made(), name=name))
    (tmp_path / "README.md").write_text("not a model")
    assert available() == ["istn-brains", "istn-trees"]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "istn-trees.safetensors"
    for given in ("istn-trees", path, str(path), "istn-trees.safetensors", Path("istn-trees.safetensors")):
        assert load(given).name == "istn-trees"
    for wrong, nearest in (("istn-tree", "istn-trees"), ("brains", "istn-brains")):
        with pytest.raises(ValueError) as caught:
            load(wrong)
        assert one_sentence(caught.value, repr(wrong), f"the nearest is {nearest!r}", "istn-brains, istn-trees")


def test_without_weights_an_unknown_name_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "none")
    assert available() == []
    with pytest.raises(ValueError) as caught:
        load("istn-trees")
    assert one_sentence(caught.value, "no model 'istn-trees'", "no weights ship")


def test_a_file_that_is_not_there_or_ends_otherwise(saved: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        load(saved.with_name("other.safetensors"))
    assert one_sentence(missing.value, "other.safetensors")
    renamed = saved.rename(saved.with_suffix(".pt"))
    with pytest.raises(ValueError) as caught:
        load(renamed)
    assert one_sentence(caught.value, ".safetensors", "istn.pt")


# ---- not a checkpoint ----


def refused(path: Path, *said: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert one_sentence(caught.value, path.name, *said), str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file(part: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    refused(saved, "truncated or no safetensors file")


def test_any_other_file(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"GIF89a" + bytes(range(256)) * 20)
    refused(path, "truncated or no safetensors file")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "truncated or no safetensors file")


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_renamed_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.safetensors", tmp_path / "ran"
    content = {"weights": Intruder(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    refused(path, "truncated or no safetensors file")
    assert not mark.exists()
    pickle.loads(pickle.dumps(content))
    assert mark.exists()  # it would have


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"kind": "istn"}])
def test_a_safetensors_file_of_someone_else(header: dict | None, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file({"weight": torch.rand(3)}, path, header)
    refused(path, "not one of regteach")


def changed(path: Path, header: dict[str, str | None] | None = None, weights: dict | None = None) -> Path:
    """The same checkpoint with other entries; None removes one."""
    with safe_open(path, "pt") as file:
        entries = dict(file.metadata())
    tensors = load_file(path)
    for target, more in ((entries, header), (tensors, weights)):
        target.update(more or {})
        for key in [key for key, value in target.items() if value is None]:
            del target[key]
    save_file(tensors, path, entries)
    return path


def other_config(**changes) -> str:
    return json.dumps(dataclasses.asdict(dataclasses.replace(CONFIGS["2d"], **changes)))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"format": "regteach-2"}, "format regteach-2, and this version reads regteach-1"),
        ({"format": "regteach-2", "kind": "georeg"}, "format regteach-2"),
        ({"kind": "georeg"}, "does not fit this version of the model"),
        ({"kind": None}, "does not fit"),
        ({"config": None}, "does not fit"),
        ({"config": "{"}, "does not fit"),
        ({"config": "[1, 2]"}, "does not fit"),
        ({"config": '{"grid": {"shape": [32, 29]}}'}, "stages"),
        ({"config": '{"grid": {"shape": [32, 29]}, "stages": [3]}'}, "does not fit"),
        ({"config": other_config(structures=4)}, "size mismatch"),
        ({"config": other_config().replace('"shrink": 1', '"shrink": 0')}, "shrink is a number of at least 1"),
        ({"card": '{"recipe": "x"}'}, "its card is no card"),
        ({"card": "[]"}, "its card is no card"),
        ({"config": other_config(itn=())}, "nexpected key"),
        ({"refinement": '{"steps": 5, "momentum": 1}'}, "momentum"),
        ({"refinement": '{"steps": -5}'}, "0 steps or more"),
        ({"card": None}, "card"),
        ({"card": "not JSON"}, "does not fit"),
        ({"name": None}, "name"),
    ],
)
def test_a_checkpoint_of_another_version(header: dict, said: str, saved: Path) -> None:
    refused(changed(saved, header), said)


def test_weights_that_are_missing_or_not_finite(saved: Path) -> None:
    content = saved.read_bytes()
    key = next(iter(load_file(saved)))
    refused(changed(saved, weights={key: None}), key)
    saved.write_bytes(content)
    refused(changed(saved, weights={key: torch.full_like(load_file(saved)[key], torch.nan)}), "not finite", key)


# ---- what can not be saved ----


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    large = made()
    next(large.network.parameters()).data.fill_(1e6)  # more than half precision holds
    for path, model, said in (
        (tmp_path / "m.pt", made(), ".safetensors"),
        (tmp_path / "m.safetensors", Model("linear", nn.Linear(2, 2)), "not a Linear"),
        (tmp_path / "m.safetensors", large, "not finite"),
        (tmp_path / "none" / "m.safetensors", made(), "can not be written"),
    ):
        with pytest.raises(ValueError) as caught:
            save_model(path, model)
        assert one_sentence(caught.value, said)
    assert list(tmp_path.iterdir()) == []
