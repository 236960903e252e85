"""The accuracy of a model, now or as an earlier run has measured it."""

import hashlib
from typing import Any

from torch import nn

from ..data.accuracy import accuracy_of
from ..data.images import ImageSource
from ..hub.load import Checkpoint
from ..runtime.journal import Record
from ..runtime.run import Run


def measure(
    run: Run, what: str, classifier: nn.Module, checkpoint: Checkpoint, data: ImageSource | None
) -> dict[str, Any] | None:
    """Accuracy on all of some labelled images, once for all runs that go on from each other; None without images. The
    checkpoint has the preprocessing and the classes of the model, which is called ``what``."""
    if data is None:
        return None

    def found() -> Record:
        run.say(f"Measuring the {what} model on {data.name} ({data.split})")
        accuracy = accuracy_of(classifier, data, checkpoint.preprocess, checkpoint.class_names, run=run)
        return Record({}, accuracy.to_dict())

    key = hashlib.sha256(repr((data.name, data.split)).encode()).hexdigest()[:8]
    return run.journal.once(f"accuracy-{what}-{key}", found).facts
