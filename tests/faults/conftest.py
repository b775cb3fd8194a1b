"""Examples that are the same whatever else is tested in the same process."""

import pytest
from hypothesis.internal.conjecture import providers


@pytest.fixture(autouse=True)
def same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis also tries numbers and words that it finds in modules which happen to be imported.

    It has no setting for that. Where it has changed inside, examples may differ again.
    """
    nothing = providers.Constants()
    monkeypatch.setattr(providers, "_get_local_constants", lambda: nothing, raising=False)
