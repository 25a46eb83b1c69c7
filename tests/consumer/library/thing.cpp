#include "thing.hpp"

namespace thing {

Layer make_layer() {
  return Layer(
      {.width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .active = 2}, .seed = 1});
}

}  // namespace thing
