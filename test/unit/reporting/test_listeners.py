"""Every listener hears everything."""

import inspect

from reporting.reporter import Listeners, Reporter


def test_what_a_reporter_is_told_is_told_to_all_listeners():
    names = {name for name, _ in inspect.getmembers(Reporter, inspect.isfunction) if name[0] != "_"}
    heard = []

    class Hears(Reporter):
        pass

    for name in names:
        setattr(Hears, name, lambda self, *words, name=name: heard.append((self, name)))
    both = Hears(), Hears()
    for name in names:
        parameters = list(inspect.signature(getattr(Reporter, name)).parameters.values())[1:]
        getattr(Listeners(*both), name)(*(None for _ in parameters))
    assert {(one, name) for one in both for name in names} == set(heard)
