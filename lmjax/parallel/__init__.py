"""Many devices and many processes: meshes, agreement between processes, sums over devices."""
