"""The model that is measured: one million parameters, and next to nothing to compute."""

from torch import Tensor, nn


class Million(nn.Module):
    """One linear layer, float32[n, 999] to float32[n, 1000]: 999,000 weights and 1,000 biases, 4 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(999, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        scores: Tensor = self.scores(x)
        return scores
