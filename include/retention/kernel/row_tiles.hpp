// How the rows of the chunks, queries or keys, are divided among blocks.

#pragma once

#include <cstdint>

#include "retention/collective/key_tiles.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

/// The chunks of packed sequences cut into tiles of some tokens, the last one of each shorter.
/// Every tile has a number, as chunks have (`Sequences`).
struct PackedTiles {
  Sequences const& sequences;
  int tokens;  // of a tile; no more than a chunk's

  struct Tile {
    int sequence;  // place among those listed
    int chunk;
    int index;  // in the chunk
  };

  CUTE_HOST_DEVICE int in_chunk() const { return cute::ceil_div(sequences.chunk_size, tokens); }

  /// Tiles of so many tokens before: the number of the first one of a sequence there, beside those
  /// of the sequences before it. Were all tokens cut alike, each tile of a sequence would start in
  /// another one of these.
  CUTE_HOST_DEVICE int start(int token) const {
    return token / sequences.chunk_size * in_chunk() + token % sequences.chunk_size / tokens;
  }
  CUTE_HOST_DEVICE int count() const { return sequences.numbers(start(sequences.length)); }
  /// At most so many.
  CUTE_HOST std::int64_t most() const {
    return std::int64_t{start(sequences.length)} + sequences.listed;
  }
  CUTE_HOST std::int64_t turn_blocks() const {
    return sequences.turn_blocks(start(sequences.length));
  }

  /// For a number below count(), the same in all lanes of a warp; beyond the end of its sequence
  /// where there is no tile.
  CUTE_DEVICE Tile find(int number) const {
    Chunk const found = sequences.search(
        number, [&](SequenceList::Entry const& entry) { return start(entry.first_token); });
    if (sequences.list.entries[found.sequence].length <= sequences.whole_until) {
      return {found.sequence, 0, found.index};
    }
    return {found.sequence, found.index / in_chunk(), found.index % in_chunk()};
  }
};

/// Which tiles of a chunk have the most work and, where chunks are long, come first. Queries have
/// that of the tokens before them, keys that of those after.
enum class HeavyTiles { kLast, kFirst };

/// Tiles of up to kRows rows: consecutive tokens of a chunk, and of each token all `group` query
/// heads that read one key head. They share the state, the keys and the values that a block loads.
/// Rows that are keys have a `group` of 1.
template <int kRows, HeavyTiles kHeavy = HeavyTiles::kLast>
struct RowTiles {
  static_assert(kRows <= 256, "collective::TileRows divides exactly up to there");

  /// Where a block's rows are.
  using Tile = PackedTiles::Tile;

  Sequences const& sequences;
  int group;  // at most kRows

  /// (tile, key head). Nothing to do where x is 0.
  CUTE_HOST dim3 grid(int heads) const {
    std::int64_t const blocks = sequences.packed() ? packed_tiles().most()
                                : is_quadratic()   ? tiles().num_slots()
                                                   : sequences.num_slots() * chunk_tiles();
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads), 1);
  }

  CUTE_HOST std::int64_t turn_blocks() const { return packed_tiles().turn_blocks(); }

  /// How many numbers there are.
  CUTE_DEVICE int count() const {
    return sequences.packed() ? packed_tiles().count() : static_cast<int>(gridDim.x);
  }

  /// The tiles of a chunk are neighbours, for they share its state, its keys and its values.
  CUTE_DEVICE Tile find(int number) const {
    if (sequences.packed()) {
      return packed_tiles().find(ordered(number, count()));
    }
    if (is_quadratic()) {
      return {number % sequences.count, 0, ordered(number / sequences.count, tiles().max_chunks())};
    }
    int const in_chunk = chunk_tiles();
    Chunk const chunk = sequences.find(number / in_chunk);
    return {chunk.sequence, chunk.index, ordered(number % in_chunk, in_chunk)};
  }

  /// There may be none.
  CUTE_DEVICE collective::TileRows rows(Tile const& tile, Sequence const& sequence) const {
    int const chunk_size = sequence.chunk_size;
    int const tile_size = tile_tokens();
    std::int64_t const before = static_cast<std::int64_t>(tile.index) * tile_size;
    std::int64_t const left =
        sequence.length - static_cast<std::int64_t>(tile.chunk) * chunk_size - before;
    if (left <= 0) {
      return {group, 0, 0};
    }
    int const first_query = static_cast<int>(before);
    int const tokens = cute::min(tile_size, chunk_size - first_query);
    int const queries = left < tokens ? static_cast<int>(left) : tokens;
    return {group, first_query, queries};
  }

 private:
  CUTE_HOST_DEVICE static int ordered(int index, int count) {
    return kHeavy == HeavyTiles::kLast ? count - 1 - index : index;
  }
  // One chunk a sequence.
  CUTE_HOST_DEVICE bool is_quadratic() const { return sequences.chunk_size >= sequences.length; }
  CUTE_HOST_DEVICE int tile_tokens() const {
    return cute::min(kRows / group, sequences.chunk_size);
  }
  CUTE_HOST_DEVICE int chunk_tiles() const {
    return cute::ceil_div(sequences.chunk_size, tile_tokens());
  }
  CUTE_HOST_DEVICE PackedTiles packed_tiles() const { return {sequences, tile_tokens()}; }
  CUTE_HOST_DEVICE Sequences tiles() const { return sequences.pieces(tile_tokens()); }
};

}  // namespace retention::kernel
