#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <moe/moe.hpp>
#include <optional>
#include <span>
#include <vector>

#include "attention.hpp"
#include "dictionary.hpp"

/// \file
/// The network: it reads letters and writes phonemes.

namespace pronounce {

/// One word to be pronounced. The reward uses the listed pronunciations, the network does not.
struct Word {
  std::span<const Index> letters;
  std::span<const Phonemes> pronunciations;
};

/// Encoder, mixture of experts, decoder with attention; a moe::Policy.
///
///     letters     embedding; an LSTM from left to right and one from right to left, H each
///     memory      x + MoE(x) for the 2H numbers of every letter of every word in the batch at once
///     phonemes    embedding of the phoneme before; an LSTM that starts from the two encoders' ends;
///                 attention to the letters; tanh of a linear layer of state and context; softmax
template <class Scalar_ = float>
class Model {
 public:
  using Scalar = Scalar_;

 private:
  using Matrix = moe::Matrix<Scalar>;
  using Embedding = moe::Embedding<Scalar>;
  using LSTM = moe::LSTM<Scalar>;
  using Linear = moe::Linear<Scalar>;
  using Dropout = moe::Dropout<Scalar>;
  using Mixture = moe::MoELayer<moe::Expert<moe::FeedForward, Scalar>>;
  using Noise = std::optional<moe::NoiseKey>;

 public:
  struct Config {
    Index letters = 0;   ///< symbols of a spelling
    Index phonemes = 0;  ///< symbols of a pronunciation, the end among them
    Index embedding = 64;
    Index width = 128;             ///< H of the three LSTMs
    Index experts = 16;            ///< E
    Index top_k = 2;               ///< K
    Index expert_hidden = 256;     ///< of an expert
    double dropout = 0.2;          ///< at first, see set_dropout()
    double balance_weight = 0.01;  ///< of the importance and the load loss
    std::uint64_t seed = 1;
  };

  struct EncoderTape {
    std::vector<Index> letters;     ///< of all words, one after the other
    std::vector<Index> offsets;     ///< where each word's start, see Attention
    std::vector<Index> rightwards;  ///< L x B, a letter a row, 0 in padding
    std::vector<Index> leftwards;   ///< the same, each word from its end
    typename Embedding::Tape embedding_rightwards, embedding_leftwards;
    typename LSTM::Tape lstm_rightwards, lstm_leftwards;
    Matrix both;  ///< letters x 2H
    typename Dropout::Tape dropout;
    typename Mixture::Tape mixture;
    Matrix memory;  ///< letters x 2H
    typename Linear::Tape keys;
    Matrix ends;  ///< B x 2H, the last states
    typename Linear::Tape bridge;
    Matrix initial;  ///< B x H, what the decoder starts from
    Matrix dmemory, dboth, dinitial, drightwards, dleftwards;
  };

  struct DecoderTape {
    std::vector<Index> ids;  ///< what is read, 0 in padding
    typename Embedding::Tape embedding;
    typename Dropout::Tape dropout_embedding, dropout_output;
    typename LSTM::Tape lstm;
    moe::PackedRows real;      ///< rows that are no padding: T' of T
    std::vector<Index> words;  ///< of each of those
    Matrix state;              ///< T' x H
    typename Linear::Tape query;
    typename Attention<Scalar>::Tape attention;
    Matrix joined;  ///< T' x 3H, state and context
    typename Linear::Tape output;
    Matrix activated;  ///< T' x H
    typename Linear::Tape logits;
    Matrix all_logits, all_hidden;  ///< T rows, 0 in padding
    Matrix dlogits, doutput, dstate, dcontext, dall_states;
  };

  // What moe::Policy requires.
  using Input = Word;
  struct Tape {
    Index samples = 0;
    EncoderTape encoder;
    DecoderTape decoder;
    typename LSTM::State state;
  };
  struct State : Tape {
    Noise noise;
    Index rows = 0;  ///< before this step, padding too
    Index real = 0;  ///< before this step
  };

  explicit Model(const Config& config)
      : config_(config),
        letters_({.vocabulary = config.letters, .width = config.embedding, .init_stddev = 0.3},
                 seed(0)),
        rightwards_({.inputs = config.embedding, .hidden = config.width}, seed(1)),
        leftwards_({.inputs = config.embedding, .hidden = config.width}, seed(2)),
        mixture_({.width = 2 * config.width,
                  .expert = {.hidden = config.expert_hidden},
                  .gate = {.experts = config.experts,
                           .top_k = config.top_k,
                           .importance_weight = config.balance_weight,
                           .load_weight = config.balance_weight},
                  .seed = seed(4)}),
        keys_({.inputs = 2 * config.width, .outputs = config.width, .bias = false}, seed(5)),
        bridge_({.inputs = 2 * config.width, .outputs = config.width}, seed(6)),
        phonemes_({.vocabulary = config.phonemes, .width = config.embedding, .init_stddev = 0.3},
                  seed(7)),
        decoder_({.inputs = config.embedding, .hidden = config.width}, seed(8)),
        query_({.inputs = config.width, .outputs = config.width, .bias = false}, seed(9)),
        output_({.inputs = 3 * config.width, .outputs = config.width}, seed(10)),
        logits_({.inputs = config.width, .outputs = config.phonemes}, seed(11)) {
    set_dropout(config.dropout);
  }

  const Config& config() const { return config_; }
  Index symbols() const { return config_.phonemes; }

  /// Of all that is trained from now on.
  void set_dropout(double rate) {
    config_.dropout = rate;
    dropout_both_ = Dropout({.rate = rate}, seed(3));
    dropout_embedding_ = Dropout({.rate = rate}, seed(12));
    dropout_output_ = Dropout({.rate = rate}, seed(13));
  }

  /// Multiply-adds of a forward pass in the products with weights: not those of the attention, which
  /// grow with the word, nor those of the bridge, which there is one of a word.
  struct Operations {
    Index letter = 0;
    Index mixture = 0;  ///< of `letter`: the gate, its noise too, and the experts used
    Index phoneme = 0;
  };
  Operations operations() const {
    const Index H = config_.width;
    const Index lstm = 4 * H * (config_.embedding + H);
    const Index mixture = 2 * H * (2 * config_.experts + 2 * config_.top_k * config_.expert_hidden);
    const Index keys = 2 * H * H;
    const Index query = H * H;
    const Index output = 3 * H * H;
    return {.letter = 2 * lstm + mixture + keys,
            .mixture = mixture,
            .phoneme = lstm + query + output + H * config_.phonemes};
  }

  void begin(std::span<const Word> words, Index samples, const Noise& noise, State& state) const {
    state.samples = samples;
    state.noise = noise;
    state.rows = 0;
    state.real = 0;
    encode(words, noise, state.encoder);
    start(state);
  }

  const Matrix& step(std::span<const Index> previous, State& state) const {
    const Matrix& logits = decode(previous, state.noise, state.rows, state.real, state);
    state.rows += static_cast<Index>(previous.size());
    state.real += state.decoder.real.count();
    return logits;
  }

  const Matrix& forward(std::span<const Word> words, Index samples, std::span<const Index> previous,
                        const Noise& noise, Tape& tape) const {
    tape.samples = samples;
    encode(words, noise, tape.encoder);
    start(tape);
    return decode(previous, noise, 0, 0, tape);
  }

  void backward(const Matrix& dlogits, Tape& tape) {
    decode_backward(dlogits, tape);
    encode_backward(tape);
  }

  /// What the logits are a linear function of.
  const Matrix& hidden(const Tape& tape) const { return tape.decoder.all_hidden; }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("letters", self.letters_);
    visit("rightwards", self.rightwards_);
    visit("leftwards", self.leftwards_);
    visit("mixture", self.mixture_);
    visit("keys", self.keys_);
    visit("bridge", self.bridge_);
    visit("phonemes", self.phonemes_);
    visit("decoder", self.decoder_);
    visit("query", self.query_);
    visit("output", self.output_);
    visit("logits", self.logits_);
  }

 private:
  using Letters = typename Attention<Scalar>::Letters;

  std::uint64_t seed(std::uint64_t part) const { return moe::derive_seed(config_.seed, part); }

  /// Rows of padding follow a word's letters in both directions, so no state of a letter sees them.
  void encode(std::span<const Word> words, const Noise& noise, EncoderTape& tape) const {
    const auto count = static_cast<Index>(words.size());
    tape.letters.clear();
    tape.offsets.assign(1, 0);
    Index longest = 0;
    for (const Word& word : words) {
      tape.letters.insert(tape.letters.end(), word.letters.begin(), word.letters.end());
      tape.offsets.push_back(static_cast<Index>(tape.letters.size()));
      longest = std::max(longest, static_cast<Index>(word.letters.size()));
    }
    tape.rightwards.assign(static_cast<std::size_t>(longest * count), 0);
    tape.leftwards = tape.rightwards;
    for_each_letter(tape, [&](Index i, Index row, Index row_from_end) {
      const Index letter = tape.letters[static_cast<std::size_t>(i)];
      tape.rightwards[static_cast<std::size_t>(row)] = letter;
      tape.leftwards[static_cast<std::size_t>(row_from_end)] = letter;
    });
    const Matrix& right = read(rightwards_, tape.rightwards, count, noise,
                               tape.embedding_rightwards, tape.lstm_rightwards);
    const Matrix& left = read(leftwards_, tape.leftwards, count, noise, tape.embedding_leftwards,
                              tape.lstm_leftwards);
    const Index H = config_.width;
    tape.both.resize(tape.offsets.back(), 2 * H);
    for_each_letter(tape, [&](Index i, Index row, Index row_from_end) {
      tape.both.row(i).leftCols(H) = right.row(row);
      tape.both.row(i).rightCols(H) = left.row(row_from_end);
    });

    const Matrix& dropped = noise ? dropout_both_.forward(tape.both, tape.dropout, *noise)
                                  : dropout_both_.evaluate(tape.both, tape.dropout);
    const auto mixed = [&]() -> const Matrix& {
      if (!noise) return mixture_.evaluate(dropped, tape.mixture);
      return mixture_.forward(dropped, tape.mixture,
                              {.step = noise->step, .first_token = noise->first_token});
    };
    tape.memory = dropped + mixed();
    noise ? keys_.forward(tape.memory, tape.keys) : keys_.evaluate(tape.memory, tape.keys);

    tape.ends.resize(count, 2 * H);
    for (Index w = 0; w < count; ++w) {
      tape.ends.row(w).leftCols(H) = tape.both.row(last_letter(tape, w)).leftCols(H);
      tape.ends.row(w).rightCols(H) = tape.both.row(first_letter(tape, w)).rightCols(H);
    }
    const Matrix& bridged =
        noise ? bridge_.forward(tape.ends, tape.bridge) : bridge_.evaluate(tape.ends, tape.bridge);
    tape.initial = bridged.array().tanh();
  }

  /// Takes the gradients by keys and values, and that by the decoder's initial state, from the tape.
  void encode_backward(Tape& tape) {
    EncoderTape& e = tape.encoder;
    const Index H = config_.width;
    const auto count = static_cast<Index>(e.offsets.size()) - 1;
    e.dmemory =
        tape.decoder.attention.dvalues + keys_.backward(tape.decoder.attention.dkeys, e.keys);
    e.dmemory += mixture_.backward(e.dmemory, e.mixture);
    e.dboth = dropout_both_.backward(e.dmemory, e.dropout);

    e.dinitial.setZero(count, H);
    const Matrix& dstate = tape.decoder.lstm.dstate.hidden;
    for (Index row = 0; row < dstate.rows(); ++row) {
      e.dinitial.row(row / tape.samples) += dstate.row(row);
    }
    e.dinitial.array() *= 1 - e.initial.array().square();
    const Matrix& dends = bridge_.backward(e.dinitial, e.bridge);
    for (Index w = 0; w < count; ++w) {
      e.dboth.row(last_letter(e, w)).leftCols(H) += dends.row(w).leftCols(H);
      e.dboth.row(first_letter(e, w)).rightCols(H) += dends.row(w).rightCols(H);
    }

    e.drightwards.setZero(static_cast<Index>(e.rightwards.size()), H);
    e.dleftwards.setZero(static_cast<Index>(e.leftwards.size()), H);
    for_each_letter(e, [&](Index i, Index row, Index row_from_end) {
      e.drightwards.row(row) = e.dboth.row(i).leftCols(H);
      e.dleftwards.row(row_from_end) = e.dboth.row(i).rightCols(H);
    });
    letters_.backward(rightwards_.backward(e.drightwards, e.lstm_rightwards),
                      e.embedding_rightwards);
    letters_.backward(leftwards_.backward(e.dleftwards, e.lstm_leftwards), e.embedding_leftwards);
  }

  static Index first_letter(const EncoderTape& tape, Index word) {
    return tape.offsets[static_cast<std::size_t>(word)];
  }
  static Index last_letter(const EncoderTape& tape, Index word) {
    return tape.offsets[static_cast<std::size_t>(word) + 1] - 1;
  }

  /// Calls f(index among all letters, row in reading order, row from the word's end).
  template <class F>
  static void for_each_letter(const EncoderTape& tape, F&& f) {
    const auto count = static_cast<Index>(tape.offsets.size()) - 1;
    for (Index w = 0; w < count; ++w) {
      const Index first = first_letter(tape, w);
      const Index last = last_letter(tape, w);
      for (Index i = first; i <= last; ++i) f(i, (i - first) * count + w, (last - i) * count + w);
    }
  }

  const Matrix& read(const LSTM& lstm, std::span<const Index> ids, Index count, const Noise& noise,
                     typename Embedding::Tape& embedding, typename LSTM::Tape& tape) const {
    typename LSTM::State state = lstm.initial_state(count);
    return noise ? lstm.forward(letters_.forward(ids, embedding), state, tape)
                 : lstm.evaluate(letters_.evaluate(ids, embedding), state, tape);
  }

  /// The decoder's state before the first phoneme: a row a sample.
  void start(Tape& tape) const {
    const Matrix& initial = tape.encoder.initial;
    tape.state = decoder_.initial_state(initial.rows() * tape.samples);
    for (Index row = 0; row < tape.state.hidden.rows(); ++row) {
      tape.state.hidden.row(row) = initial.row(row / tape.samples);
    }
  }

  /// One step or all: previous.size() is a multiple of the number of rows. Padding goes through the
  /// recurrence, whose rows are in step, and through nothing else. `rows` and `real` are how many came
  /// before, for the noise.
  const Matrix& decode(std::span<const Index> previous, const Noise& noise, Index rows, Index real,
                       Tape& tape) const {
    DecoderTape& d = tape.decoder;
    const auto noise_after = [&](Index count) {
      moe::NoiseKey key = *noise;
      key.first_token += static_cast<std::uint32_t>(count);
      return key;
    };
    d.ids.assign(previous.begin(), previous.end());
    for (Index& id : d.ids) id = std::max<Index>(0, id);
    const Matrix& embedded =
        noise ? dropout_embedding_.forward(phonemes_.forward(d.ids, d.embedding),
                                           d.dropout_embedding, noise_after(rows))
              : phonemes_.evaluate(d.ids, d.embedding);
    const Index sequences = tape.state.hidden.rows();
    const Matrix& states = noise ? decoder_.forward(embedded, tape.state, d.lstm)
                                 : decoder_.evaluate(embedded, tape.state, d.lstm);

    d.real.assign(previous);
    d.words.clear();
    for (const Index row : d.real.rows) d.words.push_back(row % sequences / tape.samples);
    d.real.pack(states, d.state);
    const Matrix& query =
        noise ? query_.forward(d.state, d.query) : query_.evaluate(d.state, d.query);
    const Matrix& context =
        Attention<Scalar>::forward(query, d.words, letters_of(tape.encoder), d.attention);
    d.joined.resize(d.state.rows(), d.state.cols() + context.cols());
    d.joined.leftCols(d.state.cols()) = d.state;
    d.joined.rightCols(context.cols()) = context;
    d.activated =
        noise ? output_.forward(d.joined, d.output) : output_.evaluate(d.joined, d.output);
    for (Index i = 0; i < d.activated.rows(); ++i) {
      Scalar* row = d.activated.row(i).data();
      moe::detail::map(
          d.activated.cols(), row, [](const auto& v) { return moe::detail::tanh<Scalar>(v); }, row);
    }
    const Matrix& dropped =
        noise ? dropout_output_.forward(d.activated, d.dropout_output, noise_after(real))
              : dropout_output_.evaluate(d.activated, d.dropout_output);
    const Matrix& logits =
        noise ? logits_.forward(dropped, d.logits) : logits_.evaluate(dropped, d.logits);
    d.real.unpack(dropped, states.rows(), d.all_hidden);
    d.real.unpack(logits, states.rows(), d.all_logits);
    return d.all_logits;
  }

  void decode_backward(const Matrix& dlogits, Tape& tape) {
    DecoderTape& d = tape.decoder;
    d.real.pack(dlogits, d.dlogits);
    d.doutput =
        dropout_output_.backward(logits_.backward(d.dlogits, d.logits), d.dropout_output).array() *
        (1 - d.activated.array().square());
    const Matrix& djoined = output_.backward(d.doutput, d.output);
    d.dstate = djoined.leftCols(config_.width);
    d.dcontext = djoined.rightCols(2 * config_.width);
    Attention<Scalar>::backward(d.dcontext, letters_of(tape.encoder), d.attention);
    d.dstate += query_.backward(d.attention.dquery, d.query);
    d.real.unpack(d.dstate, dlogits.rows(), d.dall_states);
    phonemes_.backward(
        dropout_embedding_.backward(decoder_.backward(d.dall_states, d.lstm), d.dropout_embedding),
        d.embedding);
  }

  static Letters letters_of(const EncoderTape& tape) {
    return {tape.offsets, tape.keys.y, tape.memory};
  }

  Config config_;
  Embedding letters_;
  LSTM rightwards_, leftwards_;
  Mixture mixture_;
  Linear keys_, bridge_;
  Embedding phonemes_;
  LSTM decoder_;
  Linear query_, output_, logits_;
  Dropout dropout_both_{{}, 0}, dropout_embedding_{{}, 0}, dropout_output_{{}, 0};
};

static_assert(moe::PolicyWithHidden<Model<float>>);

}  // namespace pronounce
