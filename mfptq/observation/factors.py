"""Keep the few directions in which an input is largest: factors F, `[r, K]`, with F^T F close to the sum of x x^T from below.

Called by `observation.sums` with the activations of one sample after the other. Nothing but F is kept between them, so that
memory does not grow with text and a run can go on from what a file holds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..calibration.file import factor_rank

Float64Array = npt.NDArray[np.float64]

_SEED = 0
_LEAST_LENGTH = 1e-6  # of the longest factor: what is shorter is rounding, where text has had fewer directions so far


class FactorSums:
    """The factors of one input.

    A sample X joins them as one matrix C, F above X. Rows U^T C, with orthonormal columns U, never say more than C^T C; U spans
    C times the directions that F has now, which is a step of the power method. So F turns towards the largest directions of
    all the text while the text goes by.
    """

    def __init__(self, columns: int) -> None:
        self._rank = factor_rank(columns)
        self._factors = torch.zeros((self._rank, columns))

    def add(self, rows: torch.Tensor) -> None:
        """Take in activations `[T, K]`, float32."""
        factors = self._factors.to(rows.device)
        together = torch.cat([factors, rows])
        basis, _ = torch.linalg.qr((together @ self._directions(factors).T).double())
        self._factors = basis.T.float() @ together

    def _directions(self, factors: torch.Tensor) -> torch.Tensor:
        """Return rows of unit length along the factors; where there are none yet, random ones."""
        length = factors.norm(dim=1, keepdim=True)
        long = length > _LEAST_LENGTH * length.max()
        if bool(long.all()):
            return factors.div(length)
        generator = torch.Generator().manual_seed(_SEED)
        random = torch.randn(factors.shape, generator=generator).to(factors.device)
        return torch.where(long, factors / length, random)

    def mean(self, tokens: int) -> npt.NDArray[np.float32]:
        """Return the factors of the mean over so many tokens, float32 `[r, K]`."""
        scaled: npt.NDArray[np.float32] = (self._factors.cpu().double() / tokens**0.5).numpy().astype(np.float32)
        return scaled

    def restore(self, factors: npt.NDArray[np.float32], tokens: int) -> None:
        """Go on from the factors of a mean."""
        self._factors = torch.from_numpy((factors.astype(np.float64) * tokens**0.5).astype(np.float32))
