"""Expert fill: records of a host store, copied into the slots of device pools inside a compiled step."""
