"""Fitting a generator to an image, and measuring how good it came out."""

from sparse_gen.fitting import stop
from sparse_gen.fitting.fit import FitResult, fit
from sparse_gen.fitting.metrics import psnr, ssim

__all__ = ["FitResult", "fit", "psnr", "ssim", "stop"]
