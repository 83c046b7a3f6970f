"""Ways in which lists of tensors get into files, the authors' among them."""

import pickle

import torch


def _pickle(value, path, protocol):
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=protocol)


SAVE = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle 2": lambda value, path: _pickle(value, path, 2),
    "pickle 5": lambda value, path: _pickle(value, path, 5),
}
