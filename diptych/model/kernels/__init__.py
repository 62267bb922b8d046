"""GPU kernels in Triton, and the schedules that they follow. Imported on a GPU only (and by tests, interpreted)."""
