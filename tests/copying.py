"""Copies of models that are made once: several times as fast as `copy.deepcopy`, or as making them again."""

import copy
import functools
import io
import pickle

import torch


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and keeps them in a list."""

    def __init__(self, file):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors, self.places = [], {}

    def persistent_id(self, value):
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self.places:  # a weight that two modules share stays one
            self.places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.places[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tensors):
        super().__init__(file)
        self.persistent_load = tensors.__getitem__


class Original:
    """Anything that can be pickled, of which `copy` makes copies that share nothing with it or with each other."""

    def __init__(self, value):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        self._structure, self._tensors = file.getvalue(), copy.deepcopy(pickler.tensors)

    def copy(self):
        return _Unpickler(io.BytesIO(self._structure), copy.deepcopy(self._tensors)).load()


def made_once(make):
    """Decorates a function: for arguments of which `repr` tells all it makes something once, and returns copies of it.
    PyTorch's random numbers go on as if it had been made each time."""
    made = {}

    @functools.wraps(make)
    def copies(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            made[key] = Original(make(*args, **kwargs)), torch.get_rng_state()
        original, random = made[key]
        torch.set_rng_state(random)
        return original.copy()

    return copies
