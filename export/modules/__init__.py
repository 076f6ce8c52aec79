"""The networks, one file each, written for export; attribute names are the checkpoint's keys."""
