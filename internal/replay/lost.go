// This file settles accounts with a backend that is gone.

package replay

// strike counts the backends in a row that got all messages which end at upTo
// or before it, and after the strike before it, and broke before they
// acknowledged them. The more to the front a message is, the more backends had it.
type strike struct {
	upTo  uint64
	count int
}

// Lost settles accounts with a backend that is gone, once nothing is being
// written to it any more and all that it proved to have read was given to Ack.
// With Resume, Pending starts again with the first byte of the first message
// for the next backend, and the first replayed messages may be repeats. limit
// is how many backends in a row may break with the same message; zero means
// any number. After another verdict, only Drop follows.
func (q *Queue) Lost(mode Mode, limit int) (v Verdict, replayed int) {
	q.seen = max(q.seen, q.whole())
	if v = q.verdict(mode, limit); v != Resume {
		return v, 0
	}
	replayed = q.ends.upTo(q.seen)
	if mode != Unacked {
		q.forget(replayed)
		replayed = 0
	}
	if q.open == streamed || q.open == passed {
		q.open = givenUp
	}
	q.gone, q.sent, q.acked, q.reached, q.handed = q.base, q.base, q.base, q.base, 0
	return Resume, replayed
}

// Suspect reports whether a message has met so many backends in a row that broke
// that one more would be the limit.
func (q *Queue) Suspect(limit int) bool {
	return limit > 1 && len(q.strikes) > 0 && q.strikes[0].upTo > q.acked && q.strikes[0].count >= limit-1
}

func (q *Queue) verdict(mode Mode, limit int) Verdict {
	strikes := 0
	if mode == Unacked && limit > 0 {
		strikes = q.strike()
	} else {
		q.strikes = nil
	}
	switch {
	case mode == Off:
		return Resume
	case q.sent < q.base, q.open == streamed, q.open == passed:
		return Torn
	case mode == Strict && q.seen > q.acked, mode == Unacked && q.stream > q.acked:
		return InDoubt
	case limit > 0 && strikes >= limit:
		return Poison
	default:
		return Resume
	}
}

// strike counts this loss against the messages that the backend got whole and
// did not acknowledge. It returns how many backends in a row the message that
// has met most of them has met. That is the first one, so an entry is needed only
// where the count changes.
func (q *Queue) strike() int {
	if q.handed == 0 {
		q.strikes = nil
		return 0
	}
	upTo := q.ends.at(q.handed - 1)
	var counted []strike
	for _, s := range q.strikes {
		if s.upTo <= q.acked {
			continue
		}
		counted = append(counted, strike{min(s.upTo, upTo), s.count + 1})
		if s.upTo >= upTo {
			break // the messages after upTo did not get that far
		}
	}
	if n := len(counted); n == 0 || counted[n-1].upTo < upTo {
		counted = append(counted, strike{upTo, 1})
	}
	q.strikes = counted
	return counted[0].count
}
