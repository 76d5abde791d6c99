"""python -m onevision_edge"""

from .cli import main

main()
