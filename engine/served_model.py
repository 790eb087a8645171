"""The model as those see it who serve it: its shape, and what its inputs mean."""

from dataclasses import dataclass

from ranks.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ServedModel(ModelShape):
    """A model that takes dense features and ids and returns click probabilities.

    Attributes:
        takes_integers: the model has learned from log(x + 1) of the data's integers x.
        one_id: every bag that the model has learned from holds one id.
        max_ind_range: Criteo's categories are taken modulo this before their ids are looked up;
            -1: they are not.
    """

    takes_integers: bool
    one_id: bool
    max_ind_range: int = -1
