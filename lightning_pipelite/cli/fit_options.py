"""The options of a training run, from configuration files, the command line, the environment and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_pipelite import __version__, adapters, callbacks
from lightning_pipelite.cli.error_messages import ENV_PREFIX, SECTIONS, check_config_file, check_environment, explain
from lightning_pipelite.cli.jsonargparse_compat import take_integers_first
from lightning_pipelite.cli.null_values import refuse_nulls
from lightning_pipelite.cli.saved_config import SaveConfig
from lightning_pipelite.cli.sections import LINKS, is_linked, is_no_section
from lightning_pipelite.cli.trainer_options import check_seed
from lightning_pipelite.data import PackedDataModule
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.module.pipelite_module import PipeLiteModule
from lightning_pipelite.shared.lazy_names import import_names


class ConfiguredCLI(LightningCLI):
    """The options of ``pipelite fit`` and ``pipelite validate``, as LightningCLI reads them.

    Args:
        description: Description for ``--help``.
        arguments: Command-line arguments; those of ``sys.argv`` if None.

    Raises:
        ConfigurationError: If an option is wrong.
    """

    may_lack = False
    """Whether options that fit requires may be missing."""

    def __init__(self, description: str = "", arguments: Sequence[str] | None = None) -> None:
        for package in (adapters, callbacks):  # so that jsonargparse knows their classes by short names
            import_names(package)
        super().__init__(
            PipeLiteModule,
            PackedDataModule,
            parser_class=_PartialParser if self.may_lack else LightningArgumentParser,
            args=arguments,  # type: ignore[arg-type]
            save_config_callback=SaveConfig,
            trainer_defaults={
                "strategy": {"class_path": "lightning_pipelite.PipeLiteStrategy"},
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            parser_kwargs={
                "description": description,
                "version": __version__,
                "env_prefix": ENV_PREFIX,
                "default_env": True,
                "exit_on_error": False,
            },
            auto_configure_optimizers=False,  # the module has its own
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=_ConfigFile, help="YAML or JSON file with these options.")
        return parser

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in ("fit", "validate")}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for target, source in LINKS.items():
            # Not on parse: if the environment is parsed too, jsonargparse applies such links before it reads the
            # command line, and refuses the model_dir that is still missing.
            parser.link_arguments(source, target, apply_on="instantiate")

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        take_integers_first(parser)
        if subcommand == "fit":
            parser.add_argument(
                "--overwrite",
                action=ActionYesNo(no_prefix=None),  # type: ignore[arg-type]
                default=False,
                help="Start from scratch and replace the results of an earlier run: trained weights and checkpoints.",
            )
        return parser

    @property
    def _known_to(self) -> Mapping[str, ArgumentParser]:
        """The parsers of the commands, whose options are suggested for misspelt ones."""
        return self._subcommand_parsers

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_environment(self._subcommand_parsers)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ConfigurationError(explain(str(error), self._known_to)) from None
        given = self.config[self.config.subcommand]
        for section in SECTIONS:
            if given.get(section) is None and self.may_lack:
                given[section] = Namespace()
            if not isinstance(given.get(section), Namespace):
                raise ConfigurationError(is_no_section(section, given.get(section)))
        for section, made in (("trainer", Trainer), ("model", PipeLiteModule), ("data", PackedDataModule)):
            refuse_nulls(section, made, given[section].as_dict())
        for target, source in LINKS.items():
            if given.get(target) is not None:
                raise ConfigurationError(is_linked(target, source))
        check_seed(given.seed_everything)


class _PartialParser(LightningArgumentParser):
    """Accepts options even if required ones are missing."""

    @override
    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **{**kwargs, "skip_required": True})


def read_options(words: Sequence[str], others: Mapping[str, ArgumentParser]) -> dict[str, Any]:
    """Read all options of ``pipelite fit`` by section, with defaults for those not given.

    Args:
        words: The arguments after ``pipelite fit``.
        others: Further parsers whose options are suggested for misspelt ones.

    Returns:
        The sections, with links resolved. Missing options without a default are None.

    Raises:
        ConfigurationError: If fit would refuse an option.
    """
    content: dict[str, Any] = _Reader(words, others).config.fit.as_dict()
    for target, source in LINKS.items():
        (section, name), (from_section, from_name) = target.split("."), source.split(".")
        content[section][name] = content[from_section].get(from_name)
    return content


class _Reader(ConfiguredCLI):
    """Reads the options and runs nothing."""

    may_lack = True

    def __init__(self, words: Sequence[str], others: Mapping[str, ArgumentParser]) -> None:
        self._others = others
        super().__init__(arguments=["fit", *words])

    @property
    @override
    def _known_to(self) -> Mapping[str, ArgumentParser]:
        return {**self._others, **self._subcommand_parsers}

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: no checkpoint is resumed from."""

    @override
    def _set_seed(self) -> None:
        """Do nothing: no random numbers are drawn."""

    @override
    def instantiate_classes(self) -> None:
        """Do nothing: the command instantiates what it needs."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing: the command itself runs."""


class _ConfigFile(ActionConfigFile):
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        check_config_file(values)
        super().__call__(parser, cfg, values, option_string)
