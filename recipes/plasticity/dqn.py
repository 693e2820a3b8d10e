"""Q-learning with a network, a target network and a memory (Mnih et al. 2015; double: van Hasselt et al. 2016)."""

from __future__ import annotations

import copy
import statistics
import time
from typing import cast

import torch
from torch import Tensor, nn

from recipes.plasticity.balancing import ACTIONS, OBSERVED, ChangingCartPole
from recipes.plasticity.network import Network, silent_share
from recipes.plasticity.settings import Setting
from recipes.plasticity.streams import Stream
from recipes.plasticity.training import PEERS, Method, Run, equipped

DISCOUNT, EXPLORED, MEMORY, WARM, SYNCHRONISED = 0.99, 0.05, 4000, 500, 200


class Memory:
    """The last transitions, as many as fit, in tensors.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.before, self.after = torch.zeros(size, OBSERVED), torch.zeros(size, OBSERVED)
        self.action = torch.zeros(size, dtype=torch.long)
        self.reward, self.fell = torch.zeros(size), torch.zeros(size)
        self.count = 0

    def add(self, before: Tensor, action: int, reward: float, after: Tensor, fell: bool) -> None:
        """One transition, over the oldest."""
        place = self.count % len(self.action)
        self.before[place], self.after[place], self.action[place] = before, after, action
        self.reward[place], self.fell[place] = reward, float(fell)
        self.count += 1

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """``n`` of them: observations before, actions, rewards, observations after, and 1 where it ended there."""
        places = torch.randint(min(self.count, len(self.action)), (n,), generator=generator)
        kept = (self.before, self.action, self.reward, self.after, self.fell)
        return tuple(of[places] for of in kept)


class Learner:
    """A network that learns the values of actions, by the optimizer that it is given.

    Args:
        model: of :data:`OBSERVED` numbers and :data:`ACTIONS` values.
        optimizer: of its parameters, wrapped or not.
        peer: what a method does before and after each step.
    """

    def __init__(self, model: Network, optimizer: torch.optim.Optimizer, peer: Method) -> None:
        self.model, self.optimizer, self.peer = model, optimizer, peer
        self.target = copy.deepcopy(model).requires_grad_(False)
        self.steps = 0

    @torch.no_grad()
    def act(self, seen: Tensor) -> int:
        """The action of the largest value."""
        return int(self.model(seen[None]).argmax())

    def learn(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor, fell: Tensor) -> None:
        """One step towards the values that the target network promises."""
        with torch.no_grad():
            best = self.model(after).argmax(1, keepdim=True)
            promised = reward + DISCOUNT * (1 - fell) * self.target(after).gather(1, best)[:, 0]
        self.optimizer.zero_grad()
        values = self.model(before).gather(1, action[:, None])[:, 0]
        nn.functional.smooth_l1_loss(values, promised).backward()
        self.peer.pull()
        self.optimizer.step()
        self.peer.act()
        self.steps += 1
        if self.steps % SYNCHRONISED == 0:
            self.target.load_state_dict(self.model.state_dict())


def balance(stream: Stream, setting: Setting, method: str, seed: int, images: object = None) -> Run:
    """One training on ``stream.tasks`` phases of ``stream.samples`` steps; a task's score is its mean return.

    Methods of one seed see the same changes, begin with the same weights, and from then on each its own experience.

    Raises:
        BadInput: gymnasium, or the method, is not installed.
    """
    begin = time.perf_counter()
    torch.manual_seed(seed)
    draws, generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    world = ChangingCartPole(torch.Generator().manual_seed(seed + 2), 10_000 * seed)
    model = cast(Network, setting.model(OBSERVED, ACTIONS))
    births: list[int] = []
    optimizer = equipped(method, model, setting.bare(model), OBSERVED, seed, generator, births)
    learner = Learner(model, optimizer, PEERS.get(method, Method)(model, optimizer, generator))
    memory, curve = Memory(MEMORY), []
    for task in range(stream.tasks):
        if task:
            world.change()
        curve.append(statistics.mean(_phase(world, learner, memory, stream, draws)))
    silent = silent_share(model, memory.before)
    score = statistics.mean(curve[-stream.last :])
    return Run(setting.name, method, seed, score, time.perf_counter() - begin, curve, silent, sum(births))


def _phase(
    world: ChangingCartPole, learner: Learner, memory: Memory, stream: Stream, draws: torch.Generator
) -> list[float]:
    """Play and learn for a phase; the returns of its episodes, the last of which the phase cuts off."""
    returns, total, seen = [], 0.0, world.reset()
    for _ in range(stream.samples):
        explores = bool(torch.rand((), generator=draws) < EXPLORED)
        action = int(torch.randint(ACTIONS, (), generator=draws)) if explores else learner.act(seen)
        after, reward, fell, over = world.step(action)
        memory.add(seen, action, reward, after, fell)
        total, seen = total + reward, after
        if over:
            returns.append(total)
            total, seen = 0.0, world.reset()
        if memory.count >= WARM:
            learner.learn(*memory.draw(stream.batch, draws))
    return [*returns, total] if total or not returns else returns
