"""The forward of an exit-aware decoder."""

import inspect
import threading
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_settings

from adept_fx.capture import accepts, capture
from adept_fx.errors import InputError, StaleGraphError
from adept_fx.intercept.masks import RECURRENT
from adept_fx.kv import build_policy
from adept_fx.lower.masks import fills, known_keys, prompt_keys, visible_keys
from adept_fx.lower.program import compile_options, compile_program
from adept_fx.lower.stacks import Stacks
from adept_fx.pipeline import Program, build, start
from adept_fx.runtime.call import Call, autocast_dtype, read_call
from adept_fx.runtime.costs import Costs, measure
from adept_fx.runtime.fingerprint import (
    Fingerprint,
    agree,
    choices,
    refuse_hooks,
    refuse_several_devices,
)
from adept_fx.runtime.inputs import program_inputs, token_positions
from adept_fx.runtime.masks import fits_rows, real_tokens
from adept_fx.runtime.pooling import Pooling
from adept_fx.runtime.programs import Programs
from adept_fx.runtime.run import Run, Settings
from adept_fx.shell import plain_shell

if TYPE_CHECKING:
    from adept_fx.runtime.handle import Adept


# Compiled graphs may not depend on two sizes having been equal once.
_own_symbols: Any = partial(shape_settings.patch, use_duck_shape=False)  # type: ignore[attr-defined]

# What a graph is captured for: whether the caller passes `position_ids`, which further arguments
# (name, shape behind [B, S], dtype), whether it passes `inputs_embeds`, what autocast computes in.
_Form = tuple[bool, frozenset[Any], bool, torch.dtype | None]


class ExitAwareForward:
    """Takes the place of a decoder's ``forward``.

    Keeps the programs captured so far (one per form of call), nothing of any call.

    Args:
        adept: The model's handle.
        decoder: The decoder shell whose ``forward`` this is.

    Attributes:
        pooling: What tells the tokens that a call's result depends on; None if all count.
        costs: What a layer costs on this machine; None until the model is compiled.
    """

    def __init__(self, adept: "Adept", decoder: nn.Module) -> None:
        self.adept = adept
        self.decoder = decoder
        self.pooling: Pooling | None = None
        self.costs: Costs | None = None
        self._lock = threading.RLock()
        self._programs = Programs()
        self._options: dict[str, Any] | None = None
        self._stacks = Stacks()
        self._layers = getattr(decoder.config, "num_hidden_layers", None)
        self._choices = choices(decoder)
        self._takes_positions = accepts(decoder, "position_ids")
        # What tools that look at a forward's parameters are to see.
        forward = inspect.signature(type(decoder).forward)
        self.__signature__ = forward.replace(parameters=list(forward.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder with exits; same arguments and output as the original's forward.

        Under an outer ``torch.compile`` it stays on the host: gates decide there what runs. Its
        stages are compiled by :meth:`compile`, under an outer one or not.
        """
        return self._run(args, kwargs)

    @torch.compiler.disable
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = read_call(self.decoder, self.__signature__, args, kwargs)
        given = self._takes_positions and call.position_ids is not None
        program = self.program(positions=given, extras=call.extras, embeds=call.ids is None)
        shape = (call.embeds.shape[0], call.embeds.shape[1])
        real = real_tokens(call.attention_mask, shape, call.cache)
        settings = self.adept.settings(program, shape[1])
        pooled = self._pooled(call, settings)
        if settings.by_row and pooled is None:
            settings = replace(settings, thresholds=(1.0,) * len(settings.exits))
        # The masks follow the cache that the original makes, even where nobody will read it.
        cache = call.cache if pooled is None else None
        visible = self._visible(program, call)
        inputs = program_inputs(program, call, masks=visible is None)
        packable = all(
            fits_rows(program.masks[name], item, shape[1])
            for name, item in zip(program.inputs, inputs, strict=True)
            if name in program.masks and program.masks[name].function is not RECURRENT
        )
        run = Run(settings, shape, real, cache, call.embeds.device, packable, pooled)
        run.visible = visible
        if settings.needs("position"):
            run.positions = token_positions(call)
        if settings.compiled and visible is None:
            self._drop_masks(program, inputs, run)
        hidden = self._forward(program, run, inputs)
        self.adept.record(run, hidden)
        output = program.output_type(last_hidden_state=hidden, past_key_values=cache)
        return output if call.return_dict else output.to_tuple()

    def _forward(self, program: Program, run: Run, inputs: list[Any]) -> Tensor:
        if not run.settings.compiled:
            result: Tensor = program.graph(run, *inputs)
            return result
        # Parts recorded as CUDA graphs hand values on in memory that lives for one step.
        torch.compiler.cudagraph_mark_step_begin()
        with _own_symbols():
            result = program.graph(run, *inputs)
        return result.clone() if result.is_cuda else result

    def _visible(self, program: Program, call: Call) -> int | None:
        """How many keys attention is given, where that is known without its masks."""
        if not self.compiled or not program.masks or not program.slices_keys:
            return None
        return known_keys(program.masks.values(), call, program.kind_layers)

    def _drop_masks(self, program: Program, inputs: list[Any], run: Run) -> None:
        """Cuts the keys to those that there are, where masks say no more than that."""
        places = [at for at, name in enumerate(program.inputs) if name in program.masks]
        if not places or not program.slices_keys:
            return
        masks = [inputs[at] for at in places]
        run.visible = prompt_keys(masks, run.cache, run.tokens)
        visible = visible_keys(masks, run.cache, run.tokens)
        if visible is None:
            return
        # The last step that a static cache has room for would be compiled apart.
        run.eager = fills(masks, visible)
        if not run.eager:
            run.visible = visible
            for at in places:
                inputs[at] = None

    def _pooled(self, call: Call, settings: Settings) -> Tensor | None:
        """Tokens whose exit ends their row, ``[B, S]``; None if rows run as long as any does."""
        if self.pooling is None or call.wants_cache or not settings.may_exit:
            return None
        return self.pooling.pooled_tokens(call.embeds)

    def program(
        self, *, positions: bool, extras: dict[str, Tensor] | None = None, embeds: bool = False
    ) -> Program:
        """The program for calls with such arguments, under the present autocast.

        Captured again after changes.

        Raises:
            AdeptError: The decoder cannot be captured or rewritten.
        """
        self._check_layers()
        weight = self.decoder.get_input_embeddings().weight  # type: ignore[operator]
        extras = extras or {}
        shapes = frozenset((k, tuple(v.shape[2:]), v.dtype) for k, v in extras.items())
        form: _Form = positions, shapes, embeds, autocast_dtype(weight.device)
        found = self._programs.find(form)
        if found is not None:
            return found
        if self._options is not None and not self._programs.fit:
            raise StaleGraphError(
                "the model changed (a module, a tensor's dtype or device, its mode, a hook or a "
                "setting) after adept.compile()",
                hint="undo the change, or adept.uncompile() and compile() again",
            )
        with self._lock:
            found = self._programs.find(form)
            if found is None:
                found, seen = self._capture(positions, extras, embeds)
                self._compile(found)
                self._programs.add(form, found, seen)
            return found

    def _check_layers(self) -> None:
        """Raises if something cut the config's layers down, as ``assistant_early_exit`` does."""
        config: Any = self.decoder.config
        if config.num_hidden_layers != self._layers:
            asked, config.num_hidden_layers = config.num_hidden_layers, self._layers
            raise InputError(
                f"the call asks for {asked} of {self._layers} layers (assistant_early_exit?)",
                hint="assistant_early_exit cannot be combined with exits: use the original model",
            )

    def _capture(
        self, positions: bool, extras: dict[str, Tensor], embeds: bool
    ) -> tuple[Program, Fingerprint]:
        refuse_hooks(self.decoder)
        refuse_several_devices(self.decoder)
        self._choices = agree(self.decoder, self._choices)
        seen = Fingerprint.of(self.decoder, skip=self.adept)
        captured = capture(
            plain_shell(self.decoder), positions=positions, extras=extras, embeds=embeds
        )
        config = self.adept.config
        exits = config.exit_layers
        needs = tuple(gate.needs for gate in self.adept.gate_list())
        policy = build_policy(self.adept.kv_maps, exits[0])
        work = start(captured, exits, needs, policy, adapters=bool(self.adept.adapters))
        return build(captured, work), seen

    def prepare(self) -> Program:
        """Captures the form that ``generate`` calls."""
        return self.program(positions=self._takes_positions)

    @property
    def used(self) -> Program | None:
        """The program used last, if there is one."""
        return self._programs.last

    def current(self) -> Program:
        """The program used last, or the form that ``generate`` calls."""
        return self.used or self.prepare()

    def forget(self) -> None:
        """Makes the next call capture again."""
        with self._lock:
            self._programs.clear()

    @property
    def compiled(self) -> bool:
        """Whether programs are compiled."""
        return self._options is not None

    def compile(self, mode: str | None, options: dict[str, Any]) -> None:
        """Compiles what is captured, and what will be."""
        with self._lock:
            if self.compiled:
                self.uncompile()
            self._options = compile_options(mode, options)
            for program in self._programs.only_fitting():
                self._compile(program)
            self.prepare()

    def _compile(self, program: Program) -> None:
        if self._options is not None:
            compile_program(program, self._stacks, self._options)
            self.costs = self.costs or measure(program)

    def uncompile(self) -> None:
        """Back to eager; every parameter gets its own memory again."""
        with self._lock:
            self._stacks.undo()
            self._options = self.costs = None
            self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExitAwareForward":
        """A copy captures its own graphs, and is not compiled: those look into other modules."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.adept = deepcopy(self.adept, memo)
        copied.decoder = deepcopy(self.decoder, memo)
        copied.pooling = deepcopy(self.pooling, memo)
        copied._lock = threading.RLock()
        copied._programs = Programs()
        copied._options = copied.costs = None
        copied._stacks = Stacks()
        copied.__signature__ = self.__signature__
        copied._layers = self._layers
        copied._choices = dict(self._choices)
        copied._takes_positions = self._takes_positions
        return copied
