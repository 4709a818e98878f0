"""The demo's model: 64 pixels of a handwritten digit in, ten scores out."""

from torch import Tensor, nn


class Digits(nn.Module):
    """A multi-layer perceptron, 64-64-10: float32[n, 64] (pixels from 0 to 1) to float32[n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 64)
        self.scores = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores, one for each digit; the highest is the answer."""
        return self.scores(self.hidden(x).relu())
