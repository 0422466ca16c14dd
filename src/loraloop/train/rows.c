/* Element-wise passes over rows. */
#include "kernels.h"
