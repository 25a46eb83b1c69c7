#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/kernels/math.hpp"
#include "moe/optim/parameter_blocks.hpp"
#include "moe/optim/parameter_groups.hpp"
#include "moe/optim/parameter_state.hpp"

namespace moe {

namespace detail {

/// Means over the rows and over the columns of a matrix: r, rows x 1, and c, 1 x columns.
template <class Scalar>
struct FactoredMatrix {
  Matrix<Scalar>& row_means;
  Matrix<Scalar>& column_means;
};

}  // namespace detail

/// Adam without a first moment, and with the second moment of a matrix saved as its row means r and
/// its column means c: D + H numbers of a D x H matrix, where Adam saves 2·D·H [S17 App. D]. At
/// update t = 1, 2, ...:
///
///     r_i = β2·r_i + (1 - β2)·mean over j of g_ij²        both start at 0
///     c_j = β2·c_j + (1 - β2)·mean over i of g_ij²
///     v = r·cᵀ / mean(r)               v̂ = v / (1 - β2^t)
///     w = (1 - η·weight_decay)·w - η·g / (√v̂ + ε)         η the learning rate
///
/// Where g² = a·bᵀ at every update, with the same a at all updates or the same b, v is Adam's and
/// the update is Adam's with β1 = 0. This holds for every vector: a bias is a matrix of one row,
/// its c the full second moment. Elsewhere v is the matrix of rank one that has the row and column
/// means of Adam's. An element that is large for its row and its column then moves by more than η,
/// and by far more if most of mean(r) comes from other rows and columns: of a gradient diag(1000,
/// 1) the first update moves the second element by 1000·η. A lower learning rate than Adam's helps.
///
/// N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018
/// (arXiv 1804.04235) appeared a year later. Adafactor factors v in the same way, but does not
/// correct the bias and lets β2 rise with t instead, adds its constant to g² and not to the root,
/// scales an update down whose root mean square is above 1, and takes steps relative to the size of
/// the weights. FactoredAdam has none of this.
///
/// A gradient that is zero everywhere gives v = 0 and no move. r_i·c_j is never formed, so the sums of
/// squares limit the range of gradients: in float up to 1e16, and below 1e-19 they count less and less.
/// If a gradient or its square is not finite, its whole parameter becomes NaN, since mean(r)
/// includes it, but no other parameter does; as with Adam, the NaN stays in the state.
///
/// Updates::lazy leaves an expert that got no token alone, as Adam's does. A dense update lets the
/// r, the c and the weights of such an expert decay.
///
/// Reads the gradient twice and the weights once, and writes the weights: four sevenths of Adam's
/// traffic. After the first update of a module, later updates with as many threads do not allocate,
/// except for parameters that were not trained until then. It keeps one row of column sums, in double and
/// as long as the widest matrix, for each worker, or for each of up to 16 pieces of a large matrix if
/// these are more.
template <class Scalar = float>
class FactoredAdam {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    double beta2 = 0.999;              ///< in [0, 1)
    double epsilon = 1e-8;             ///< above 0 as a Scalar too
    double weight_decay = 0;           ///< at least 0
    Updates updates = Updates::dense;  ///< whether experts without tokens are left alone
  };

  FactoredAdam() : FactoredAdam(Config{}) {}
  /// For `FactoredAdam optimizer({})`, which would be ambiguous otherwise.
  explicit FactoredAdam(detail::Defaults) : FactoredAdam() {}
  /// Throws std::invalid_argument for a configuration out of range.
  explicit FactoredAdam(const Config& config) : config_(config) {
    detail::check_decay_rate("FactoredAdam", "beta2", config.beta2);
    const auto epsilon = static_cast<Scalar>(config.epsilon);
    detail::require(epsilon > 0 && std::isfinite(epsilon),
                    "FactoredAdam::Config.epsilon = ", config.epsilon,
                    ", must be finite and above 0");
    detail::check_weight_decay("FactoredAdam", config.weight_decay);
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// Sets learning rates and weight decays by the parameters' names; see ParameterGroups. An empty
  /// function removes them.
  void set_groups(ParameterGroups groups) { groups_.set(std::move(groups)); }

  /// Moves every parameter by its gradient. Throws std::invalid_argument, with nothing changed, if
  /// the learning rate or a field of a group is negative or not finite, or if the module is not that
  /// of the first update.
  template <class Module>
  void update(Module& module, double learning_rate) {
    groups_.match(module, "FactoredAdam", config_.weight_decay, learning_rate);
    detail::match_states(module, "FactoredAdam", row_means_, column_means_, updates_);
    detail::prepare_gradients(module, config_.updates);
    reserve_sums(module);
    const double common = correction(updates_.total() + 1);
    const auto update_one = [&](Index index, Parameter<Scalar>& parameter, Index worker) {
      if (groups_.is_fixed(index)) return;
      const Index made = updates_[index];
      const bool as_often = made == updates_.total();
      const auto [factor, decay] = groups_[index];
      update_parameter(constants_at(learning_rate * factor, decay),
                       as_often ? common : correction(made + 1), parameter,
                       {row_means_[index], column_means_[index]}, worker);
    };
    // Small parameters go to one worker each; a large one is cut into pieces for all of them.
    const auto is_whole = [](const auto& parameter) { return pieces_of(parameter.value) == 1; };
    detail::for_each_whole_parameter(module, config_.updates, is_whole, update_one);
    Index index = 0;
    detail::walk_parameters(module, [&](const ParameterName&, Parameter<Scalar>& parameter) {
      const Index i = index++;
      if (is_whole(parameter) || detail::is_idle(parameter, config_.updates)) return;
      update_one(i, parameter, 0);
    });
    updates_.add(module, config_.updates, groups_);
  }

  /// Changes the optimizer's state in step with the experts of a layer that is a part of the model of
  /// update(). Call it right after each change of the experts. The state of parameters that stayed, and
  /// their numbers of updates, keep their bits; copies get those of their original, fresh parameters and
  /// columns zeros. Row means of the gate's matrices stay those over the columns before the change. Throws
  /// std::invalid_argument, with nothing changed, if the change is not the layer's last, or if follow()
  /// was not called for an earlier one.
  template <class Module, class Layer>
  void follow(const Module& model, const Layer& layer, const ExpertChange& change) {
    detail::follow_change("FactoredAdam", model, layer, change, row_means_.known(), row_means_,
                          column_means_, updates_);
  }

  /// The whole state of the optimizer for a module, to save or restore it: calls
  /// f(name, matrix) with "row_means.experts.3.up.weight" (D x 1) and
  /// "column_means. ..." (1 x H), and f(name, numbers), a std::span<Index>, with "steps" and
  /// "updates". Before the first update it is all zero; the matrix of a parameter that was never
  /// trained is empty, 0 x 0, which stands for zeros. An f(name, matrix, shape) also gets the
  /// StateShape that the matrix has when it is not empty. Throws std::invalid_argument if the
  /// module is not that of the first update.
  template <class Module, class F>
  void for_each_state(const Module& module, F&& f) {
    detail::match_states(module, "FactoredAdam", row_means_, column_means_, updates_);
    row_means_.for_each(module, "row_means", f);
    column_means_.for_each(module, "column_means", f);
    updates_.for_each(f);
  }

 private:
  using Packet = detail::Packet<Scalar>;

  /// The numbers of columns and rows that are computed at once: their sums and roots are on the
  /// stack, in L1, and sums of short sums lose fewer digits than long sums.
  static constexpr Index strip_columns = 1024;
  static constexpr Index strip_rows = 64;

  struct Constants {
    Packet epsilon;
    Packet step;
    Packet decay;
  };

  Constants constants_at(double learning_rate, double weight_decay) const {
    const auto packet = [](double value) { return detail::broadcast(static_cast<Scalar>(value)); };
    return {packet(config_.epsilon), packet(learning_rate),
            packet(1 - learning_rate * weight_decay)};
  }

  double correction(Index t) const { return 1 - std::pow(config_.beta2, static_cast<double>(t)); }

  /// The number of pieces, of some rows each, into which a matrix is cut. It depends on the shape
  /// alone, since the order of the columns' sums depends on it.
  static Index pieces_of(const Matrix<Scalar>& matrix) {
    constexpr Index piece = Index{1} << 17;  // takes far longer than waking the workers
    constexpr Index most = 16;
    return std::max(Index{1}, std::min({matrix.size() / piece, most, matrix.rows()}));
  }

  /// Room for the sums of columns of each worker, or of each piece of a parameter.
  template <class Module>
  void reserve_sums(const Module& module) {
    Index rows = worker_count();
    Index columns = 0;
    detail::walk_parameters(module, [&](const ParameterName&, const auto& parameter) {
      if (!parameter.trained) return;
      rows = std::max(rows, pieces_of(parameter.value));
      columns = std::max(columns, parameter.value.cols());
    });
    if (column_sums_.rows() < rows || column_sums_.cols() < columns) {
      detail::resize(column_sums_, rows, columns);
    }
  }

  /// The sums of a parameter's columns go to the rows of column_sums_ from `first_sums` on.
  void update_parameter(const Constants& constants, double correction, Parameter<Scalar>& parameter,
                        const detail::FactoredMatrix<Scalar>& moment, Index first_sums) {
    const Index rows = parameter.value.rows();
    const Index columns = parameter.value.cols();
    const Index pieces = pieces_of(parameter.value);
    const auto first_row = [&](Index piece) { return piece * rows / pieces; };
    const auto sums = [&](Index piece) {
      return detail::row_data(column_sums_, first_sums + piece);
    };
    const auto beta2 = static_cast<Scalar>(config_.beta2);
    const auto share = static_cast<Scalar>((1 - config_.beta2) / static_cast<double>(columns));
    moment.row_means *= beta2;
    moment.column_means *= beta2;
    parallel_for(pieces, element_work(parameter.size()), [&](Index piece, Index) {
      add_squares(parameter.stored.memory, first_row(piece), first_row(piece + 1), share,
                  moment.row_means.data(), sums(piece));
    });
    add_column_sums(columns, first_sums, pieces, static_cast<double>(rows),
                    moment.column_means.data());
    const Scalar mean = mean_of(moment.row_means);
    parallel_for(pieces, element_work(parameter.size()), [&](Index piece, Index) {
      move(constants, correction, mean, moment, first_row(piece), first_row(piece + 1), parameter);
    });
  }

  // Of the rows from `first` to `last`: row_means[i] += share·Σ_j g_ij² and column_sums[j] = Σ_i
  // g_ij². Every sum has one order, down the rows of a strip and strip by strip.

  static void add_squares(const Matrix<Scalar>& gradient, Index first, Index last, Scalar share,
                          Scalar* row_means, double* column_sums) {
    const Index columns = gradient.cols();
    std::fill_n(column_sums, columns, 0.0);
    for (Index row = first; row < last; row += strip_rows) {
      const Index end = std::min(row + strip_rows, last);
      for (Index column = 0; column < columns; column += strip_columns) {
        const Index width = std::min(strip_columns, columns - column);
        Scalar sums[strip_columns];
        std::fill_n(sums, width, Scalar{0});
        const auto add = [&](auto rows, Index i) {
          add_squares_of_rows<rows>(width, detail::row_data(gradient, i) + column, columns, share,
                                    row_means + i, sums);
        };
        Index i = row;
        for (; i + 4 <= end; i += 4) add(std::integral_constant<Index, 4>{}, i);
        for (; i < end; ++i) add(std::integral_constant<Index, 1>{}, i);
        for (Index j = 0; j < width; ++j) column_sums[column + j] += static_cast<double>(sums[j]);
      }
    }
  }

  /// column_means[j] += (1 - β₂)/rows·Σ of the pieces' sums.
  void add_column_sums(Index columns, Index first, Index pieces, double rows,
                       Scalar* column_means) const {
    for (Index j = 0; j < columns; ++j) {
      double sum = 0;
      for (Index piece = first; piece < first + pieces; ++piece) sum += column_sums_(piece, j);
      column_means[j] += static_cast<Scalar>((1 - config_.beta2) / rows * sum);
    }
  }

  /// Several rows at once, so that the sums of the columns are read and written less often.
  template <Index rows>
  static void add_squares_of_rows(Index width, const Scalar* g, Index stride, Scalar share,
                                  Scalar* row_means, Scalar* column_sums) {
    using namespace Eigen::internal;
    Packet row_sum[detail::to_size(rows)];
    for (Packet& sum : row_sum) sum = detail::broadcast(Scalar{0});
    detail::for_each_packet<Scalar>(width, [&](auto at) {
      Packet column_sum = at.load(column_sums);
      for (Index i = 0; i < rows; ++i) {
        const Packet x = at.load(g + i * stride);
        row_sum[i] = pmadd(x, x, row_sum[i]);
        column_sum = pmadd(x, x, column_sum);
      }
      at.store(column_sums, column_sum);
    });
    for (Index i = 0; i < rows; ++i) row_means[i] += share * predux(row_sum[i]);
  }

  /// The mean, NaN if it is not finite: an infinite mean would give rows without an infinity a
  /// share of 0, and so a root of 0 to divide by.
  static Scalar mean_of(const Matrix<Scalar>& row_means) {
    double sum = 0;
    for (Index i = 0; i < row_means.size(); ++i) sum += static_cast<double>(row_means.data()[i]);
    const auto mean = static_cast<Scalar>(sum / static_cast<double>(row_means.size()));
    return std::isfinite(mean) ? mean : std::numeric_limits<Scalar>::quiet_NaN();
  }

  /// √v̂_ij as a product of two roots, since r_i·c_j has the fourth power of a gradient in it.
  static void move(const Constants& k, double correction, Scalar mean,
                   const detail::FactoredMatrix<Scalar>& moment, Index first, Index last,
                   Parameter<Scalar>& parameter) {
    using namespace Eigen::internal;
    const Index columns = parameter.value.cols();
    const auto roots_of = [](const Matrix<Scalar>& means, Index start, Index count, double scale,
                             Scalar* roots) {
      const Packet factor = detail::broadcast(static_cast<Scalar>(scale));
      detail::map(
          count, roots, [&](const Packet& m) { return pmul(detail::sqrt<Scalar>(m), factor); },
          means.data() + start);
    };
    const double row_scale = mean == 0 ? 0.0 : 1 / std::sqrt(static_cast<double>(mean));
    for (Index row = first; row < last; row += strip_rows) {
      const Index end = std::min(row + strip_rows, last);
      Scalar row_roots[strip_rows];
      roots_of(moment.row_means, row, end - row, row_scale, row_roots);
      for (Index column = 0; column < columns; column += strip_columns) {
        const Index width = std::min(strip_columns, columns - column);
        Scalar column_roots[strip_columns];
        roots_of(moment.column_means, column, width, 1 / std::sqrt(correction), column_roots);
        for (Index i = row; i < end; ++i) {
          const Packet row_root = detail::broadcast(row_roots[i - row]);
          Scalar* w = detail::row_data(parameter.value, i) + column;
          detail::map(
              width, w,
              [&](const Packet& pw, const Packet& pg, const Packet& column_root) {
                const Packet root = pmadd(row_root, column_root, k.epsilon);
                return psub(pmul(k.decay, pw), pmul(k.step, pdiv(pg, root)));
              },
              w, detail::row_data(parameter.stored.memory, i) + column, column_roots);
        }
      }
    }
  }

  Config config_;
  detail::ResolvedGroups groups_;
  detail::ParameterState<Scalar> row_means_{detail::StatePart::rows_by_one};
  detail::ParameterState<Scalar> column_means_{detail::StatePart::one_by_columns};
  detail::UpdateCounts updates_;
  Matrix<double> column_sums_;  ///< scratch; in double, since there may be many rows
};

}  // namespace moe
