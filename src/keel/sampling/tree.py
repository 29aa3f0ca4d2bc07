"""Tree sampling: rollouts of the prior share a tree, and rewards travel up it, so that later rollouts know more.

    select    from the root, while a node is full: child c with probability ~ w_c exp(v_c / beta)
    expand    a node n with fewer than C N_n^alpha children: a new one from the prior
    rollout   by the prior to the end; every state on the way becomes a node
    backup    v = r at the end;   v_n = beta log(sum_c w_c exp(v_c / beta) / sum_c w_c),   N_n += 1

A state is one node however often it is drawn, and its weight w_c is p_0(c | n), which is known for tokens. Once every
leaf was seen, v at the root is beta log Z and selection is the tilt, exactly; until then what was not seen counts like
the mean of what was.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.chain import Chain, Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.kernels import by_token
from keel.sampling.particles import Particles
from keel.sampling.settings import positive

CRUMBS = 1e-6  # probability that rounding may leave when all children are there


@dataclass(slots=True, eq=False)
class Node:
    """A state of one prompt: a token after its parent. The text is what the path says; no cache is kept.

    Args:
        parent, token, log_p, depth: where it stands, and log p_0 of the token.
        stop: why a finished one ended, -1 for the others.
        children: by token, or by number where each draw is a node of its own.
        left: probability of the tokens that are no children.
        value, visits, draws: v, N, and how often it was drawn.
        closed: nothing below it is unseen.
    """

    parent: "Node | None" = None
    token: int = -1
    log_p: float = 0.0
    depth: int = 0
    stop: int = -1
    children: dict[int, "Node"] = field(default_factory=dict)
    left: float = 1.0
    value: float = 0.0
    visits: int = 0
    draws: int = 1
    closed: bool = False

    def path(self) -> list["Node"]:
        """From the first token to this one."""
        found, node = [], self
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


@dataclass(eq=False)
class Tree:
    """The tree of one prompt.

    Args:
        root: before the first token.
        leaves: finished nodes, oldest first.
        rewards: of the texts seen.
        generated: tokens drawn for it.
    """

    root: Node = field(default_factory=Node)
    leaves: list[Node] = field(default_factory=list)
    rewards: dict[Hashable, float] = field(default_factory=dict)
    generated: int = 0


@part("tree_sampling", paper=182)
@dataclass(frozen=True)
class TreeSampling:
    """Diffusion tree sampling over tokens, and its greedy variant, a tree search; see the module.

    "sample" draws N leaves from the final tree by selection: an approximation of the tilt, log Z = v_root / beta biased
    (mostly low: what is rare and good is seen late). `kl` is that of the leaves' law in this tree, a bound in the mean.
    "search" descends by v_c + c_uct sqrt(log N_n / N_c) and puts out the best leaves, best first; more rollouts
    never make the best worse.

    All prompts make one rollout at a time, together; prefixes are read again, not written again, and cost no tokens.

    Args:
        num_particles: N.
        rollouts: at most; one that ends on a known leaf counts, a tree without anything unseen needs no more.
        beta: of the tilt.
        mode: "sample" or "search".
        widening, alpha: C and alpha.
        expansion: "new" draws a token that is no child yet, "draw" any token, and goes on selecting where it is one:
            where one token is nearly certain, "new" would visit all the others.
        weights: "prior"; "draws", how often each was drawn; or "separate", a node for each draw, as in latents. The
            latter two draw whatever `expansion` says.
        c_uct: of a search, in units of the reward.
        budget: no rollout begins for a prompt once it has generated so many tokens; None does not look.

    Raises:
        ValueError: a setting out of its range.
        UserError: a chain that does not go by tokens.

    Source: "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models", 2025, where nodes are
    separate; one node a state and the prior as its weight are ours.
    """

    num_particles: int = 1
    rollouts: int = 64
    beta: float = 0.1
    mode: Literal["sample", "search"] = "sample"
    widening: float = 1.0
    alpha: float = 0.8
    expansion: Literal["new", "draw"] = "new"
    weights: Literal["prior", "draws", "separate"] = "prior"
    c_uct: float = 1.0
    budget: int | None = None

    def __post_init__(self) -> None:
        positive(self, "num_particles", "rollouts", "beta", "widening")
        for name, known in (
            ("mode", ("sample", "search")),
            ("expansion", ("new", "draw")),
            ("weights", ("prior", "draws", "separate")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not '{getattr(self, name)}'")
        for name in ("alpha", "c_uct"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}")
        if self.budget is not None:
            positive(self, "budget")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Grow a tree for each prompt of a chain."""
        tokens = by_token(chain, "tree_sampling")
        trees = self.grow(tokens, rng)
        return self._best(tokens, trees, rng) if self.mode == "search" else self._drawn(tokens, trees, rng)

    def grow(self, chain: TokenChain, rng: Choice) -> list[Tree]:
        """The trees, one for each prompt."""
        trees = [Tree() for _ in range(chain.prompts)]
        for _ in range(self.rollouts):
            running = [p for p, tree in enumerate(trees) if not tree.root.closed and self._affords(tree)]
            if not running:
                break
            scope = rng.scope("rollout")
            for node in self._rolled(chain, trees, self._selected(trees, running, scope), scope):
                self.back_up(node)
        return trees

    def _affords(self, tree: Tree) -> bool:
        return self.budget is None or tree.generated < self.budget

    # -- select ----------------------------------------------------------------------------------------------------

    def _selected(self, trees: list[Tree], running: list[int], rng: Choice) -> dict[int, Node]:
        """The node that each prompt expands, or the leaf at which it ends."""
        found: dict[int, Node] = {}
        moving = {p: trees[p].root for p in running}
        for depth in itertools.count():
            ending = {p: node for p, node in moving.items() if node.stop >= 0 or not node.children}
            others = {p: node for p, node in moving.items() if p not in ending}
            ending |= self._expanding(others, rng, f"expand {depth}", len(trees))
            found |= ending
            moving = self._descended({p: n for p, n in others.items() if p not in ending}, rng, depth, len(trees))
            if not moving:
                return found
        raise AssertionError("a path that does not end")

    def _expanding(self, nodes: dict[int, Node], rng: Choice, name: str, prompts: int) -> dict[int, Node]:
        """Those that get another child."""
        thin = {p: node for p, node in nodes.items() if not self._is_full(node)}
        if self.weights == "separate" or (self.weights == "prior" and self.expansion == "new"):
            return thin
        lands = _draw({p: _landing(node) for p, node in thin.items()}, rng, name, prompts)
        unseen = {p: node for p, node in thin.items() if lands[p] == len(node.children)}
        for p, node in thin.items():
            if p not in unseen:
                list(node.children.values())[lands[p]].draws += 1
        return unseen

    def _is_full(self, node: Node) -> bool:
        if self.weights == "prior" and node.left <= CRUMBS:
            return True
        return len(node.children) >= self.widening * node.visits**self.alpha

    def _descended(self, nodes: dict[int, Node], rng: Choice, depth: int, prompts: int) -> dict[int, Node]:
        """A child of each."""
        if self.mode == "search":
            return {p: max(node.children.values(), key=lambda child: self._promise(child)) for p, node in nodes.items()}
        chosen = _draw({p: self.tilted(node) for p, node in nodes.items()}, rng, f"child {depth}", prompts)
        return {p: list(node.children.values())[chosen[p]] for p, node in nodes.items()}

    def _promise(self, child: Node) -> float:
        assert child.parent is not None
        return child.value + self.c_uct * math.sqrt(math.log(max(child.parent.visits, 1)) / child.visits)

    def tilted(self, node: Node) -> list[float]:
        """log of w_c exp(v_c / beta), for each child."""
        return [self._log_weight(child) + child.value / self.beta for child in node.children.values()]

    def _log_weight(self, child: Node) -> float:
        if self.weights == "prior":
            return child.log_p
        return math.log(child.draws) if self.weights == "draws" else 0.0

    # -- expand and roll out ---------------------------------------------------------------------------------------

    def _rolled(self, chain: TokenChain, trees: list[Tree], chosen: dict[int, Node], rng: Choice) -> list[Node]:
        """The leaf of each prompt that has chosen a node, new ones grown and judged."""
        growing = {p: node for p, node in chosen.items() if node.stop < 0}
        if growing:
            ends = self._completed(chain, growing, rng)
            keys = chain.key(ends)
            fresh = [p in growing and keys[p] not in trees[p].rewards for p in range(len(trees))]
            reward = chain.reward(ends, torch.tensor(fresh, device=chain.device)).tolist()
            for p, node in growing.items():
                known = trees[p].rewards.setdefault(keys[p], reward[p])
                chosen[p] = self._appended(trees[p], node, ends, p, known)
        return list(chosen.values())

    def _completed(self, chain: TokenChain, growing: dict[int, Node], rng: Choice) -> Prefix:
        """A finished state for each growing prompt, among all prompts; the others stay at their start."""
        everyone = torch.arange(chain.prompts, device=chain.device)
        rows = torch.tensor(list(growing), device=chain.device)
        paths = [[step.token for step in node.path()] for node in growing.values()]
        tokens = torch.full((len(rows), chain.horizon), chain.pad, device=chain.device)
        for i, path in enumerate(paths):
            tokens[i, : len(path)] = torch.tensor(path, dtype=torch.long, device=chain.device)
        x = chain.at(tokens, torch.tensor([len(path) for path in paths], device=chain.device), rows)
        taken = [[] if self.weights == "separate" else list(node.children) for node in growing.values()]
        for t in itertools.count():
            if bool(x.done.all()):
                break
            log_p = chain.log_probs(x)
            grid = torch.full((chain.prompts, log_p.shape[1]), -math.inf, device=log_p.device, dtype=log_p.dtype)
            grid[:, 0] = 0.0
            grid[rows] = log_p if t else _without(log_p, taken)
            chain.meter.add("generated", torch.zeros_like(everyone).index_copy(0, rows, (~x.done).long()))
            x = chain.extend(x, rng.categorical(grid, f"token {t}")[rows])
        empty = Prefix(
            tokens=torch.full((chain.prompts, chain.horizon), chain.pad, device=chain.device),
            logp=torch.zeros(chain.prompts, chain.horizon, dtype=x.logp.dtype, device=chain.device),
            length=torch.zeros_like(everyone),
            stop=torch.full_like(everyone, -1),
            prompt=everyone,
        )
        names = ("tokens", "logp", "length", "stop", "prompt")
        return Prefix(*(getattr(empty, name).index_copy(0, rows, getattr(x, name)) for name in names))

    def _appended(self, tree: Tree, node: Node, ends: Prefix, p: int, reward: float) -> Node:
        """The leaf of a rollout that began at a node."""
        tokens, log_p = ends.text(p), ends.logp[p].tolist()
        tree.generated += len(tokens) - node.depth
        for t in range(node.depth, len(tokens)):
            key = len(node.children) if self.weights == "separate" else tokens[t]
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, tokens[t], log_p[t], t + 1)
                node.left -= math.exp(log_p[t])
            else:
                child.draws += 1
            node = child
        if node.stop < 0:
            node.stop, node.value, node.closed = int(ends.stop[p]), reward, True
            tree.leaves.append(node)
        return node

    def back_up(self, leaf: Node) -> None:
        """A rollout has ended here: renew the values above."""
        leaf.visits += 1
        node = leaf.parent
        while node is not None:
            children = node.children.values()
            log_w = [self._log_weight(child) for child in children]
            node.value = soft_backup([child.value for child in children], log_w, self.beta)
            node.visits += 1
            node.closed = self.weights == "prior" and node.left <= CRUMBS and all(child.closed for child in children)
            node = node.parent

    # -- what comes out --------------------------------------------------------------------------------------------

    def law(self, tree: Tree) -> list[float]:
        """log-probability with which selection in a tree ends at each of its leaves."""
        found: dict[int, float] = {}
        waiting = [(tree.root, 0.0)]
        while waiting:
            node, log_q = waiting.pop()
            if node.stop >= 0:
                found[id(node)] = log_q
                continue
            tilted = self.tilted(node)
            total = _lse(tilted)
            waiting += [(c, log_q + a - total) for c, a in zip(node.children.values(), tilted, strict=True)]
        return [found[id(leaf)] for leaf in tree.leaves]

    def _drawn(self, chain: TokenChain, trees: list[Tree], rng: Choice) -> Particles:
        laws = [self.law(tree) for tree in trees]
        log_q = _padded(laws).to(chain.device)
        chosen = rng.categorical(log_q[:, None].expand(-1, self.num_particles, -1), "leaf")
        leaves = [[tree.leaves[i] for i in row] for tree, row in zip(trees, chosen.tolist(), strict=True)]
        log_w = torch.zeros(chosen.shape, dtype=torch.float64, device=chain.device).log_softmax(1)
        kl = [_divergence(tree, log_q) for tree, log_q in zip(trees, laws, strict=True)]
        return self._particles(chain, trees, leaves, log_w, kl)

    def _best(self, chain: TokenChain, trees: list[Tree], rng: Choice) -> Particles:
        leaves, log_w, kl = [], [], []
        ranked = [_ranked(tree) for tree in trees]
        equals = [[0.0 for leaf in row if leaf.value == row[0].value] for row in ranked]
        first = rng.categorical(_padded(equals), "pick").tolist()
        for place, row in zip(first, ranked, strict=True):
            row = [row[place], *row[:place], *row[place + 1 :]][: self.num_particles]
            missing = self.num_particles - len(row)
            leaves.append(row + row[:1] * missing)
            log_w.append([-math.log(len(row))] * len(row) + [-math.inf] * missing)
            kl.append(-_log_prior(row[0]))
        return self._particles(chain, trees, leaves, torch.tensor(log_w, dtype=torch.float64, device=chain.device), kl)

    def _particles(
        self,
        chain: TokenChain,
        trees: list[Tree],
        leaves: list[list[Node]],
        log_w: Float[Tensor, "P N"],
        kl: Sequence[float],
    ) -> Particles:
        def each(values: Sequence[float]) -> Float[Tensor, "P"]:
            return torch.tensor(values, dtype=torch.float64, device=chain.device)

        reward = torch.tensor([[leaf.value for leaf in row] for row in leaves], dtype=torch.float64)
        return Particles(
            states=_states(chain, leaves),
            log_w=log_w,
            reward=reward.to(chain.device),
            pick=torch.zeros(len(trees), dtype=torch.long, device=chain.device),
            log_z=each([tree.root.value / self.beta for tree in trees]),
            log_z_error=each([math.nan] * len(trees)),
            kl=each(kl),
            meter=chain.meter,
            kl_is_bound=True,
            details={
                "rollouts": each([float(tree.root.visits) for tree in trees]),
                "leaves": each([float(len(tree.leaves)) for tree in trees]),
            },
        )


def soft_backup(values: Sequence[float], log_weights: Sequence[float], beta: float) -> float:
    """beta log(sum_c w_c exp(v_c / beta) / sum_c w_c), the soft value of a node by those of its children.

    >>> round(soft_backup([0.0, 1.0], [0.0, 0.0], 1.0), 6)
    0.620115

    Args:
        values: v_c.
        log_weights: log w_c, unnormalised.
        beta: of the tilt.
    """
    tilted = [log_w + value / beta for log_w, value in zip(log_weights, values, strict=True)]
    return beta * (_lse(tilted) - _lse(log_weights))


def _lse(terms: Sequence[float]) -> float:
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))


def _landing(node: Node) -> list[float]:
    """log-probability that a draw of the prior is each child, or (last) none of them."""
    left = math.log(node.left) if node.left > CRUMBS else -math.inf
    return [child.log_p for child in node.children.values()] + [left]


def _draw(options: dict[int, list[float]], rng: Choice, name: str, prompts: int) -> dict[int, int]:
    """One of the options of some prompts; the others have nothing to draw."""
    if not options:
        return {}
    chosen = rng.categorical(_padded([options.get(p, [0.0]) for p in range(prompts)]), name).tolist()
    return {p: chosen[p] for p in options}


def _padded(rows: Sequence[Sequence[float]]) -> Float[Tensor, "P W"]:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[-math.inf] * (width - len(row))] for row in rows], dtype=torch.float64)


def _without(log_p: Float[Tensor, "A V"], taken: list[list[int]]) -> Float[Tensor, "A V"]:
    """Without the tokens that are taken, as long as any is left."""
    rest = log_p.clone()
    for row, tokens in enumerate(taken):
        rest[row, tokens] = -math.inf
    return torch.where((rest > -math.inf).any(1, keepdim=True), rest, log_p)


def _divergence(tree: Tree, log_q: Sequence[float]) -> float:
    """KL of the leaves' law to the prior; leaves of one text are one."""
    share: dict[tuple[int, ...], float] = {}
    prior: dict[tuple[int, ...], float] = {}
    for leaf, log in zip(tree.leaves, log_q, strict=True):
        text = _text(leaf)
        share[text] = share.get(text, 0.0) + math.exp(log)
        prior[text] = _log_prior(leaf)
    return sum(q * (math.log(q) - prior[text]) for text, q in share.items() if q > 0)


def _ranked(tree: Tree) -> list[Node]:
    """The best leaf of each text, best first."""
    best = {_text(leaf): leaf for leaf in sorted(tree.leaves, key=lambda leaf: leaf.value)[::-1]}
    return list(best.values())


def _text(leaf: Node) -> tuple[int, ...]:
    return tuple(step.token for step in leaf.path())


def _log_prior(leaf: Node) -> float:
    return sum(step.log_p for step in leaf.path())


def _states(chain: TokenChain, leaves: list[list[Node]]) -> Prefix:
    """The states of chosen leaves, prompt by prompt."""
    flat = [leaf for row in leaves for leaf in row]
    tokens: Int[Tensor, "B T"] = torch.full((len(flat), chain.horizon), chain.pad)
    logp: Float[Tensor, "B T"] = torch.zeros(len(flat), chain.horizon, dtype=chain.dtype)
    for i, leaf in enumerate(flat):
        tokens[i, : leaf.depth] = torch.tensor([step.token for step in leaf.path()])
        logp[i, : leaf.depth] = torch.tensor([step.log_p for step in leaf.path()], dtype=chain.dtype)
    prompt = [p for p, row in enumerate(leaves) for _ in row]
    numbers = (torch.tensor(n, device=chain.device) for n in ([f.depth for f in flat], [f.stop for f in flat], prompt))
    return Prefix(tokens.to(chain.device), logp.to(chain.device), *numbers)
