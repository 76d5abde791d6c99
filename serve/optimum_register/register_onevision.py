"""Where optimum-cli looks for commands of other packages: installed as optimum/commands/register/."""

from optimum.commands.export.base import ExportCommand

from onevision_edge.serve.optimum_command import OneVisionExport

REGISTER_COMMANDS = [(OneVisionExport, ExportCommand)]
