"""torch_npu that is missing, broken, or of another release is one line that says what to do."""

import sys

import pytest
import torch
from conftest import RELEASE, write_package

from common.errors import UserError
from devices.npu import import_torch_npu
from devices.npu_pairs import Installed


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """A function of the source of a made-up torch_npu, and its version: why it is refused."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)  # a test below has others

    def why(source, version=None):
        if source is not None:
            (tmp_path / "torch_npu.py").write_text(source)
        if version is not None:
            write_package(tmp_path, "torch_npu", version)
        with pytest.raises(UserError) as caught:
            import_torch_npu()
        assert str(caught.value).startswith("--use-npu: ")
        return str(caught.value)

    return why


def test_without_torch_npu_the_line_says_how_to_install_it(refusal):
    assert "not installed: `source test/env_npu.sh` names the one" in refusal(None)


NOT_IMPORTED = {
    "libhccl.so: cannot open shared object file: No such file or directory": "does not find CANN",
    "ASCEND_RUNTIME_PATH : /x/runtime does not exist. Please": "source its set_env.sh",
    "/x/libtorch_npu.so: undefined symbol: MsprofSysCycleTime": "do not go together",
    "Two accelerators cannot be used at the same time": "cannot be imported (Two accelerators",
}


@pytest.mark.parametrize("reason", NOT_IMPORTED)
def test_why_torch_npu_cannot_be_imported_is_one_line(reason, refusal):
    line = refusal(f"raise Exception({reason + chr(10) + 'more'!r})")
    assert NOT_IMPORTED[reason] in line and reason in line and "more" not in line


@pytest.mark.parametrize("version, fits", [("2.1.0", False), ("{0}.post3", True), ("{0}", True)])
def test_torch_npu_has_to_be_of_torchs_release(version, fits, refusal):
    version = version.format(RELEASE)
    line = refusal("raise ImportError('as far as this')", version)
    assert version in line and ("as far as this" in line) == fits
    if not fits:
        assert f"torch {RELEASE}" in line and "test/env_npu.sh" in line


@pytest.mark.parametrize(
    "version, cuda, aborts",
    [("2.14.0", "13.0", True), ("2.13.0", "13.0", True), ("2.12.0.post2", "12.8", False)]
    + [("2.14.0", None, False)],
)
def test_a_torch_for_cuda_that_torch_npu_cannot_stand(version, cuda, aborts, monkeypatch, refusal):
    """The import would end the process with C++'s terminate, before Python could say anything."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    here = Installed("9.2.0", version.partition(".post")[0], version, "2.2.6")
    monkeypatch.setattr(Installed, "find", classmethod(lambda cls: here))
    line = refusal("raise ImportError('as far as this')")
    assert ("is built for CUDA 13.0" in line and f"torch-npu=={version}" in line) == aborts
    assert ("as far as this" in line) != aborts
