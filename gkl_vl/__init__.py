"""Distil large CLIP teachers into small students with the Generalized Kullback-Leibler loss."""

from gkl_vl.losses.cross_logits import cross_logits_loss as cross_logits_loss
from gkl_vl.losses.gkl import ClassPrior as ClassPrior
from gkl_vl.losses.gkl import GklSettings as GklSettings
from gkl_vl.losses.gkl import dkl_loss as dkl_loss
from gkl_vl.losses.gkl import gkl_loss as gkl_loss
from gkl_vl.losses.gkl import ikl_loss as ikl_loss
from gkl_vl.losses.gkl import kl_loss as kl_loss
from gkl_vl.losses.image_text import image_text_loss as image_text_loss
from gkl_vl.losses.image_text import mimicry_loss as mimicry_loss
