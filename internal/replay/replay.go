// Package replay keeps what a client sent until a backend is known to have it,
// and settles what the next backend gets when one is lost. It is mechanism
// only: no goroutine, no clock, no socket, and no lock but the Budget's atomics.
//
// Positions count the bytes of the client's data frames, in the order in which
// they were appended. What a Queue knows of them:
//
//	gone ≤ base ≤ tail     stored is [base, tail), nothing else
//	acked, sent ≤ tail     where the current backend is
//
// Invariants:
//   - A message is stored as a whole from its first byte on, or not at all. The
//     first that is not stored frees those before it, so stored bytes are one
//     run at the end of the stream, which begins with a message.
//   - What a backend gets after Lost begins with the first byte of a message.
//   - What is marked as sent may have been written: sent is raised before a
//     write and lowered only by what the write says it left. So a message that
//     was written is never taken for one that was not.
//   - Memory is reserved in the Budget before it is allocated, is never used
//     again after it was given back, and is zero while nothing is stored.
package replay

import "fmt"

// Mode says which messages the next backend gets when one is lost.
type Mode uint8

const (
	// Unacked replays what the lost backend is not known to have read: at least once.
	Unacked Mode = iota
	// Unsent replays what was never completely written to a backend: at most once.
	Unsent
	// Strict is Unsent, but ends the client where a message is in doubt.
	Strict
	// Off keeps nothing and promises nothing.
	Off
)

var modeNames = [...]string{Unacked: "unacked", Unsent: "unsent", Strict: "strict", Off: "off"}

// ParseMode returns the mode of that name.
func ParseMode(name string) (Mode, error) {
	for m, n := range modeNames {
		if n == name {
			return Mode(m), nil
		}
	}
	return Unacked, fmt.Errorf("unknown replay %q: want unacked, unsent, strict or off", name)
}

// String returns the mode's name in the config.
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// Fate is what becomes of a unit that was offered to a Queue.
type Fate uint8

const (
	// Full means that there is no room now: nothing was taken, ask again.
	Full Fate = iota
	// Kept means stored, and to be written from there.
	Kept
	// Passed means not stored: to be written to the backend that is there.
	Passed
	// Dropped means part of a message that is given up: to be forgotten.
	Dropped
)

// Verdict is what the loss of a backend means for the client.
type Verdict uint8

const (
	// Resume means that the next backend can take over.
	Resume Verdict = iota
	// InDoubt means that a message may or may not have been read, and that the
	// mode, or the message's size, allows neither to repeat nor to forget it.
	InDoubt
	// Torn means that a message which is not stored was not completely written.
	Torn
	// Poison means that too many backends in a row broke with the same message.
	Poison
)
