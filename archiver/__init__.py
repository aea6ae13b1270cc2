"""Ships exits: repackages models as .mar files, starts TorchServe and rolls new versions in."""
