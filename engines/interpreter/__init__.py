"""Runs a parsed TensorRT network on the CPU, layer by layer, in numpy: what a GPU would be told to compute.

reading.py is the only file that looks at TensorRT's objects; network.py is what it makes of them. interpreter.py
executes a network by the semantics in kernels.py, movement.py and attention.py; context.py puts the interface of
a TensorRT engine over host memory around it; compare.py holds it against ONNX Runtime.
"""
