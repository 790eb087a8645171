"""--export-checkpoint makes the model file that the run would have written."""

import pytest
from conftest import CRITEO_MODEL, SMALL_MODEL, train, write_days
from written import checkpoints_in, flip, rewrite_index


def test_a_checkpoint_becomes_the_model_file_that_the_run_would_have_written(tmp_path):
    for number, flags in enumerate((
        ["--optimizer=adagrad", "--weighted-pooling=learned"],
        ["--optimizer=rwsadagrad", "--md-flag", "--md-threshold=50"],
        ["--qr-flag", "--qr-threshold=50", "--amp=fp16"],
    )):  # fmt: skip
        folder, own, made = (tmp_path / f"{number}{name}" for name in ("c", "own.pth", "made.pth"))
        train(*SMALL_MODEL, *flags, f"--checkpoint-dir={folder}", f"--save-model={own}")
        done = train(f"--export-checkpoint={folder}", f"--save-model={made}")
        assert done.status == 0, done.err
        assert made.read_bytes() == own.read_bytes()
        evaluated = train(*SMALL_MODEL, *flags[-4:], "--inference-only", f"--load-model={made}")
        assert evaluated.status == 0


@pytest.mark.parametrize("scalars", [[1], [[]], [None] * 6, [{"step": "x"}] * 6])
def test_crafted_numbers_of_the_optimiser_are_damage_to_an_export(scalars, tmp_path):
    train(*SMALL_MODEL, "--optimizer=adagrad", f"--checkpoint-dir={tmp_path}/c")
    (path,) = checkpoints_in(tmp_path / "c")
    rewrite_index(path, lambda content: content["state"].update(dense_scalars=scalars))
    exported = train(f"--export-checkpoint={path}", f"--save-model={tmp_path}/m.pth")
    assert exported.status == 2 and "index.json is damaged" in exported.err
    assert len(exported.err.splitlines()) == 1 and not (tmp_path / "m.pth").exists()


def test_a_damaged_checkpoint_is_exported_from_the_one_before(tmp_path):
    train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}/c", "--save-every=4")
    newest = checkpoints_in(tmp_path / "c")[-1]
    flip(newest / "rank-000-0000.safetensors", 5000)
    done = train(f"--export-checkpoint={tmp_path}/c", f"--save-model={tmp_path}/m.pth")
    assert done.status == 0 and f"warning: {newest}" in done.out
    one = train(f"--export-checkpoint={newest}", f"--save-model={tmp_path}/n.pth")
    assert one.status == 2 and not (tmp_path / "n.pth").exists()
    assert not (tmp_path / "n.pth.partial").exists()


def test_the_vocabulary_is_found_by_any_path_of_the_checkpoint(tmp_path, monkeypatch):
    write_days(tmp_path / "data", 2, 40)
    flags = [f"--data_path={tmp_path / 'data'}", "--memory-map", f"--checkpoint-dir={tmp_path}/c"]
    assert train(*CRITEO_MODEL, *flags).status == 0
    (path,) = checkpoints_in(tmp_path / "c")
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(path)
    for number, name in enumerate((path, tmp_path / "link", ".")):
        done = train(f"--export-checkpoint={name}", f"--save-model={tmp_path}/{number}.pth")
        assert done.status == 0 and "warning" not in done.out
        kept = (tmp_path / "c" / "vocabulary.bin").read_bytes()
        assert (tmp_path / f"{number}.vocabulary").read_bytes() == kept
