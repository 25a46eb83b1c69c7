#include "thing.hpp"

namespace thing {

Layer make_layer() {
  return Layer(
      {.width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
}

}  // namespace thing
