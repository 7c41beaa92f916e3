// This file holds the bound on the memory of all queues together.

package replay

import "sync/atomic"

// Budget bounds the memory of all queues that were given it. It is safe for
// concurrent use.
type Budget struct {
	limit, used atomic.Int64
}

// NewBudget returns a Budget of limit bytes.
func NewBudget(limit int64) *Budget {
	b := new(Budget)
	b.limit.Store(limit)
	return b
}

// SetLimit changes the limit. What is taken above a new one is not taken back,
// but nothing is granted until enough of it was returned.
func (b *Budget) SetLimit(bytes int64) { b.limit.Store(bytes) }

// Used returns the bytes of memory that queues have taken: the capacity of
// their chunks and of their lists of messages.
func (b *Budget) Used() int64 { return b.used.Load() }

// reserve takes n bytes, or nothing.
func (b *Budget) reserve(n int64) bool {
	for {
		used := b.used.Load()
		if n > b.limit.Load()-used {
			return false
		}
		if b.used.CompareAndSwap(used, used+n) {
			return true
		}
	}
}

func (b *Budget) release(n int64) {
	if n != 0 && b.used.Add(-n) < 0 {
		panic("replay: more memory was given back than taken")
	}
}
