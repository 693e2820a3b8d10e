"""Mean-field theory made runnable: each prediction a function, to be put beside a real network.

In: a formula, or a network and its data. Out: predictions, measurements beside them, and a diagnosis.
How particles are moved is not known here, and no other room imports this one.
"""

from torch_meanfield.theory.arc_cosine import inner_kernel as inner_kernel
from torch_meanfield.theory.arc_cosine import outer_kernel as outer_kernel
from torch_meanfield.theory.batch_norm import batch_norm_gradient_growth as batch_norm_gradient_growth
from torch_meanfield.theory.curves import CurveGeometry as CurveGeometry
from torch_meanfield.theory.curves import measure_curve as measure_curve
from torch_meanfield.theory.curves import propagate_circle as propagate_circle
from torch_meanfield.theory.diagnosis import Diagnosis as Diagnosis
from torch_meanfield.theory.diagnosis import diagnose as diagnose
from torch_meanfield.theory.dual_averaging import ParticleDualAveraging as ParticleDualAveraging
from torch_meanfield.theory.elliptic import BoundaryNet as BoundaryNet
from torch_meanfield.theory.elliptic import Collocation as Collocation
from torch_meanfield.theory.elliptic import EllipticOperator as EllipticOperator
from torch_meanfield.theory.field import field_kernel as field_kernel
from torch_meanfield.theory.field import length_variance as length_variance
from torch_meanfield.theory.fisher import FisherStatistics as FisherStatistics
from torch_meanfield.theory.fisher import measured_fisher as measured_fisher
from torch_meanfield.theory.fisher import predicted_fisher as predicted_fisher
from torch_meanfield.theory.fluctuations import fluctuation_covariance as fluctuation_covariance
from torch_meanfield.theory.fluctuations import gaussian_particles as gaussian_particles
from torch_meanfield.theory.fluctuations import monte_carlo_variance as monte_carlo_variance
from torch_meanfield.theory.fluctuations import train_particles as train_particles
from torch_meanfield.theory.heavy_tails import heavy_tailed_ as heavy_tailed_
from torch_meanfield.theory.heavy_tails import heavy_tailed_length as heavy_tailed_length
from torch_meanfield.theory.heavy_tails import heavy_tailed_length_map as heavy_tailed_length_map
from torch_meanfield.theory.isometry import JacobianMoments as JacobianMoments
from torch_meanfield.theory.isometry import critical_orthogonal_ as critical_orthogonal_
from torch_meanfield.theory.isometry import delta_orthogonal_ as delta_orthogonal_
from torch_meanfield.theory.isometry import edge_at as edge_at
from torch_meanfield.theory.isometry import jacobian_moments as jacobian_moments
from torch_meanfield.theory.isometry import jacobian_spectrum as jacobian_spectrum
from torch_meanfield.theory.langevin import MeanFieldLangevin as MeanFieldLangevin
from torch_meanfield.theory.linearised import LinearisedTraining as LinearisedTraining
from torch_meanfield.theory.linearised import linear_rate_bound as linear_rate_bound
from torch_meanfield.theory.measures import implicit_euler_step as implicit_euler_step
from torch_meanfield.theory.measures import kl_proximal_step as kl_proximal_step
from torch_meanfield.theory.measures import wfr_step as wfr_step
from torch_meanfield.theory.ntk import empirical_ntk as empirical_ntk
from torch_meanfield.theory.order_parameters import Overlaps as Overlaps
from torch_meanfield.theory.order_parameters import integrate_sgd as integrate_sgd
from torch_meanfield.theory.order_parameters import population_risk as population_risk
from torch_meanfield.theory.order_parameters import sgd_velocity as sgd_velocity
from torch_meanfield.theory.phase import Critical as Critical
from torch_meanfield.theory.phase import Phase as Phase
from torch_meanfield.theory.phase import critical as critical
from torch_meanfield.theory.phase import phase as phase
from torch_meanfield.theory.quantised import Quantised as Quantised
from torch_meanfield.theory.quantised import QuantisedEdge as QuantisedEdge
from torch_meanfield.theory.quantised import quantised_depth_scale as quantised_depth_scale
from torch_meanfield.theory.quantised import quantised_edge as quantised_edge
from torch_meanfield.theory.radial import RadialProblem as RadialProblem
from torch_meanfield.theory.radial_flow import RadialFlow as RadialFlow
from torch_meanfield.theory.radial_flow import radial_flow as radial_flow
from torch_meanfield.theory.radial_flow import radial_fokker_planck as radial_fokker_planck
from torch_meanfield.theory.residual import ResidualPropagation as ResidualPropagation
from torch_meanfield.theory.residual import normalized_residual_propagation as normalized_residual_propagation
from torch_meanfield.theory.residual import residual_propagation as residual_propagation
from torch_meanfield.theory.signal import Propagation as Propagation
from torch_meanfield.theory.signal import correlation_map as correlation_map
from torch_meanfield.theory.signal import length_map as length_map
from torch_meanfield.theory.signal import propagate as propagate
from torch_meanfield.theory.weight_norm import weight_norm_ as weight_norm_
