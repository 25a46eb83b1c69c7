#define MOE_INSTANTIATE float
#include <moe/instantiations.hpp>
