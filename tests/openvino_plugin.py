"""OpenVINO's provider for ONNX Runtime on any CPU, for the tests: where it finds none, they skip."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import Any

import pytest

from kandrt.engines import providers

BACKEND = "onnxruntime-openvino"
INTEL = 0x8086
OBJECT_HEAD = 2 * ctypes.sizeof(ctypes.c_void_p)  # where pybind11 keeps the address of what an object stands for


def require_plugin() -> None:
    """Register the plugin, on a CPU of another maker under Intel's number, or skip.

    OpenVINO computes on every x86 CPU, but up to 1.8.1 its plugin looks at the maker's number and offers no device on
    others. It looks when it is registered and never after, so the number is put back.
    """
    if find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("onnxruntime-ep-openvino is not installed (pip install 'kandrt[onnxruntime-openvino]')")
    ort = providers.import_quietly()
    hardware = next(each.device for each in ort.get_ep_devices() if each.ep_name == "CPUExecutionProvider")
    number = vendor_field(hardware)
    before, number.value = number.value, INTEL
    try:
        offered = providers.devices(BACKEND, "cpu")
    finally:
        number.value = before
    if not offered:
        pytest.skip("onnxruntime-ep-openvino offers no device on this machine")


def vendor_field(hardware: Any) -> ctypes.c_uint32:
    """The maker's number in ONNX Runtime's own description of a device: {type, vendor_id, device_id, ...}."""
    address = ctypes.c_void_p.from_address(id(hardware) + OBJECT_HEAD).value
    assert address is not None
    found = (ctypes.c_uint32 * 3).from_address(address)
    if list(found) != [0, hardware.vendor_id, hardware.device_id]:
        pytest.skip("this onnxruntime describes devices in another way")
    return ctypes.c_uint32.from_address(address + ctypes.sizeof(ctypes.c_uint32))
