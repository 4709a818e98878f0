"""The models that are measured: a million and a quarter of a million parameters, and next to nothing to compute."""

from torch import Tensor, nn


class Million(nn.Module):
    """One linear layer, float32[n, 999] to float32[n, 1000]: 999,000 weights and 1,000 biases, 4 MB."""

    FEATURES = 999

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(self.FEATURES, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        scores: Tensor = self.scores(x)
        return scores


class Quarter(Million):
    """The same with float32[n, 249]: 1 MB."""

    FEATURES = 249
