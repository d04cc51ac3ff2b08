"""Progress of a training on the command line."""

from __future__ import annotations

from transformers.trainer_callback import ProgressCallback


class Progress(ProgressCallback):
    """Transformers' progress bars, which show the loss and a score instead of printing every log to standard
    output, where the results go.

    Args:
        score: name of the score in the logs.
    """

    def __init__(self, score: str):
        super().__init__()
        self.score = score

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: logs[name] for name in ("loss", self.score) if name in logs}
        if state.is_world_process_zero and self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """Close the bars that an error has left open, so that its message gets a line of its own."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
