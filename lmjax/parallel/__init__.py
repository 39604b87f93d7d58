"""Many devices and processes: meshes, agreement between processes, reductions over devices."""
