// Must compile as it is, and must not with OF_LSTM or OF_DROPOUT defined: then the message says what the
// module of a Residual must have (tests/CMakeLists.txt).

#include "moe/nn/dropout.hpp"
#include "moe/nn/linear.hpp"
#include "moe/nn/lstm.hpp"
#include "moe/nn/residual.hpp"

#if defined(OF_LSTM)
using Module = moe::LSTM<float>;
#elif defined(OF_DROPOUT)
using Module = moe::Dropout<float>;
#else
using Module = moe::Linear<float>;
#endif

moe::Index width(const moe::Residual<Module>::Tape& tape) { return tape.y.cols(); }
