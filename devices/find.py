"""Finding the device that is asked for, and the versions of what drives it."""

import torch

from common.errors import RankError, UserError
from common.versions import installed_version
from devices.card import count_cards, device_name
from devices.gpu import cuda_driver
from devices.npu import import_torch_npu, npu_versions

DEVICE_FLAGS = {"cuda": "--use-gpu", "npu": "--use-npu"}


def find_device(device_type: str, card: int) -> torch.device:
    """Make a device the current one and return it.

    Args:
        device_type: cpu, cuda or npu.
        card: number of the card; the CPU takes any.

    Raises:
        UserError: there is no such device, or there are fewer cards.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    flag = DEVICE_FLAGS[device_type]
    if device_type == "npu":
        import_torch_npu()
    count = count_cards(device_type)
    if count == 0:
        raise UserError(
            f"{flag}: no {device_type} device found (looked with {_looked_with(device_type)});"
            f" without {flag} the CPU trains"
        )
    if card >= count:
        found = f"found {count}, {device_type}:0 to {device_type}:{count - 1}"
        raise RankError(f"{flag}: card {card} is asked for, {found}")
    torch.get_device_module(device_type).set_device(card)
    return torch.device(device_type, card)


def _looked_with(device_type: str) -> str:
    if device_type == "npu":
        version = installed_version("torch_npu")
        return f"torch_npu {version}; `npu-smi info` shows the cards and the driver"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"torch {torch.__version__}, {cuda}"


def versions(device: torch.device) -> dict[str, str]:
    """Device, driver and libraries with their versions, by name; `unknown` if one is not found."""
    found = {"device": f"{device} ({device_name(device)})"}
    if device.type == "npu":
        found |= npu_versions()
    if device.type == "cuda":
        found["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        found["driver"] = cuda_driver()
    return found | {"torch": torch.__version__}
