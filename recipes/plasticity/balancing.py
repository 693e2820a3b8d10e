"""CartPole whose pole, force, sensors and levers change: a task of reinforcement learning that does not stay."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.errors import BadInput

OBSERVED, ACTIONS, LONGEST = 4, 2, 500


class ChangingCartPole:
    """``CartPole-v1`` of gymnasium (Barto, Sutton and Anderson 1983); the first phase is the task as it is known.

    At every change half the pole's length is drawn from [0.25, 1] m (known: 0.5) and the force from [7, 15] N (known:
    10), the four observations are permuted and their signs drawn anew, and left and right are exchanged or not. An
    episode is over after 500 steps, when the pole falls or the cart leaves; each step is worth 1.

    Args:
        generator: source of the changes.
        seed: of the states in which episodes begin.

    Raises:
        BadInput: gymnasium is not installed.
    """

    def __init__(self, generator: torch.Generator, seed: int) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise BadInput('gymnasium is not installed; pip install "torch-meanfield[studies]"') from error
        self.env = gymnasium.make("CartPole-v1")
        self.generator, self.seed = generator, seed
        self.order, self.signs = torch.arange(OBSERVED), torch.ones(OBSERVED)
        self.exchanged = False

    def change(self) -> None:
        """Another pole, force, order and sign of the observations, and sense of the actions."""
        cart = self.env.unwrapped
        length, force, exchanged = torch.rand(3, generator=self.generator).tolist()
        cart.length, cart.force_mag = 0.25 + 0.75 * length, 7.0 + 8.0 * force  # type: ignore[attr-defined]
        cart.polemass_length = cart.masspole * cart.length  # type: ignore[attr-defined]
        self.order = torch.randperm(OBSERVED, generator=self.generator)
        self.signs = 2.0 * torch.randint(2, (OBSERVED,), generator=self.generator) - 1
        self.exchanged = exchanged < 0.5

    def reset(self) -> Tensor:
        """The observation at an episode's begin, ``(OBSERVED,)``."""
        state, _ = self.env.reset(seed=self.seed)
        self.seed += 1
        return self._seen(state)

    def step(self, action: int) -> tuple[Tensor, float, bool, bool]:
        """The next observation, the reward, whether the pole fell or the cart left, and whether the episode is over."""
        state, reward, fell, late, _ = self.env.step(1 - action if self.exchanged else action)
        return self._seen(state), float(reward), bool(fell), bool(fell or late)

    def _seen(self, state: object) -> Tensor:
        return torch.as_tensor(state, dtype=torch.float32)[self.order] * self.signs
