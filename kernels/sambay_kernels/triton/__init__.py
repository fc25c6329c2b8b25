"""What the Triton kernels of all ops share: functions on the device, and launching."""
