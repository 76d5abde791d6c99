"""The CPU as a build target: a bundle's graphs as steps over packed weights, run by the kernels of runtime/native."""
