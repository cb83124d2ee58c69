"""Methods found by name, built in or brought by another package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest

from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.allocation.methods.uniform import uniform
from hisvd_cli.utils import registry as module
from hisvd_cli.utils.errors import HisvdError, UsageError, suggest
from hisvd_cli.utils.registry import Registry

Method = Callable[[], str]


@pytest.fixture
def empty() -> Registry[Method]:
    """A registry of a package that has no methods."""
    return Registry("method", "hisvd_cli.cli.commands", "hisvd.tests")


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of another package: one that works, and two that do not."""
    group = "hisvd.tests"
    points = [
        EntryPoint("theirs", "os.path:basename", group),
        EntryPoint("gone", "no_such_package:method", group),
        EntryPoint("broken", "os.path:no_such_method", group),
    ]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [p for p in points if p.group == group and name in (None, p.name)]

    monkeypatch.setattr(module, "entry_points", entry_points)


def test_built_in_methods_are_found_without_an_import() -> None:
    assert {"hisvd", "uniform"} <= set(ALLOCATORS.names())
    assert ALLOCATORS.get("uniform") is uniform


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="There is no allocator 'hsvd'") as caught:
        ALLOCATORS.get("hsvd")
    assert caught.value.hint == "Did you mean 'hisvd'?"
    with pytest.raises(UsageError) as caught:
        ALLOCATORS.get("zzz")
    assert caught.value.hint.startswith("Known: asvd, hisvd, ")


def test_two_methods_of_one_name(empty: Registry[Method]) -> None:
    empty.register("mine")(str)
    empty.register("mine")(str)  # the very same one, such as on a second import
    with pytest.raises(ValueError, match="Two methods are named 'mine'"):
        empty.register("mine")(repr)  # type: ignore[arg-type]


@pytest.mark.usefixtures("brought")
def test_methods_of_other_packages(empty: Registry[Method]) -> None:
    import os.path

    assert empty.names() == ["broken", "gone", "theirs"]
    assert empty.get("theirs") is os.path.basename  # type: ignore[comparison-overlap]
    for name in ("gone", "broken"):
        with pytest.raises(HisvdError, match=f"The method '{name}' .* cannot be loaded") as caught:
            empty.get(name)
        assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("uniforn", "Did you mean 'uniform'?"),
        ("uni", "Did you mean 'uniform'?"),
        ("", "Known: hisvd, uniform."),
        ("x", "Known: hisvd, uniform."),
    ],
)
def test_suggestions(value: str, told: str) -> None:
    assert suggest(value, ["uniform", "hisvd"]) == told
