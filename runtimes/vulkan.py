"""The Vulkan devices of this machine, asked of the loader itself.

Engines reach Vulkan through other libraries, which do not say whether a device is a GPU or a driver that emulates
one on the CPU. That decides what a time measured on it means.
"""

import ctypes
import struct
from dataclasses import dataclass

KINDS = ("other", "integrated GPU", "discrete GPU", "virtual GPU", "software")  # VkPhysicalDeviceType

LOADER = "libvulkan.so.1"
HOW_TO_GET_ONE = (
    "a GPU's driver brings it, a software driver too, try apt-get install libvulkan1 mesa-vulkan-drivers"
)


@dataclass(frozen=True)
class VulkanDevice:
    """One physical device.

    Attributes:
        name: as the driver calls it.
        kind: one of KINDS.
        version: highest version of Vulkan that it supports.
    """

    name: str
    kind: str
    version: str


class _InstanceCreateInfo(ctypes.Structure):
    """VkInstanceCreateInfo of the Vulkan 1.0 specification."""

    _fields_ = (
        ("sType", ctypes.c_int),
        ("pNext", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("pApplicationInfo", ctypes.c_void_p),
        ("enabledLayerCount", ctypes.c_uint32),
        ("ppEnabledLayerNames", ctypes.c_void_p),
        ("enabledExtensionCount", ctypes.c_uint32),
        ("ppEnabledExtensionNames", ctypes.c_void_p),
    )


def has_loader() -> bool:
    """Say whether the Vulkan loader is installed."""
    try:
        ctypes.CDLL(LOADER)
    except OSError:
        return False
    return True


def vulkan_devices() -> list[VulkanDevice]:
    """List the devices that the installed drivers offer; empty without a loader, a driver or a device.

    Drivers are loaded into this process, and a broken one can end it: callers that only want to know should ask in
    a child process, as portlm.runtimes.probe does.
    """
    try:
        vulkan = ctypes.CDLL(LOADER)
    except OSError:
        return []
    instance = ctypes.c_void_p()
    if vulkan.vkCreateInstance(ctypes.byref(_InstanceCreateInfo(sType=1)), None, ctypes.byref(instance)):
        return []
    try:
        count = ctypes.c_uint32()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
        handles = (ctypes.c_void_p * count.value)()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
        return [_device(vulkan, handle) for handle in handles[: count.value]]
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _device(vulkan: ctypes.CDLL, handle: int | None) -> VulkanDevice:
    # VkPhysicalDeviceProperties begins: apiVersion, driverVersion, vendorID, deviceID, deviceType, deviceName[256].
    # It has 824 bytes in Vulkan 1.x, with the limits behind.
    properties = ctypes.create_string_buffer(4096)
    vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(handle), properties)
    version, _, _, _, kind = struct.unpack_from("=4Ii", properties.raw)
    name = properties.raw[20:276].split(b"\0", 1)[0].decode("utf-8", "replace")
    return VulkanDevice(
        name,
        KINDS[kind] if 0 <= kind < len(KINDS) else "other",
        f"{(version >> 22) & 0x7F}.{(version >> 12) & 0x3FF}.{version & 0xFFF}",
    )
