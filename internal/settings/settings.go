// Package settings holds the groups of settings that the handlers have in common,
// as they stand in JSON, with their defaults and their checks. Unset is not zero:
// unset means the default.
package settings

import (
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// Defaults.
const (
	DialTimeout       = 3 * time.Second
	HandshakeTimeout  = 10 * time.Second
	PingInterval      = 30 * time.Second
	PingTimeout       = 30 * time.Second
	WriteTimeout      = 30 * time.Second
	ResumeTimeout     = 30 * time.Second
	ResumeMin         = 100 * time.Millisecond
	ResumeMax         = 5 * time.Second
	ResumeConcurrency = 64
	ResumeLimit       = 3
	ReplayBuffer      = 5 << 20
	DrainWindow       = 10 * time.Second
)

// resumeOn are the close codes that say by default that a backend goes away, and
// not that the conversation is over.
var resumeOn = []uint16{1001, 1012, 1013}

// Transport has the settings of connecting to an upstream.
type Transport struct {
	// How long a TCP connect may take. It must be positive.
	// Default: `3s`.
	DialTimeout *caddy.Duration `json:"dial_timeout,omitempty"`

	// How long an upstream, once connected, may take to answer the handshake.
	// It must be positive.
	// Default: `10s`.
	HandshakeTimeout *caddy.Duration `json:"handshake_timeout,omitempty"`
}

// KeepAlive has the settings of live connections.
type KeepAlive struct {
	// How often each peer is sent a ping; up to 10 % sooner. Zero sends none, and
	// messages count as delivered once a backend's kernel has had them for
	// ping_timeout.
	// Default: `30s`.
	PingInterval *caddy.Duration `json:"ping_interval,omitempty"`

	// How long a peer may be silent after a ping, all of that while the proxy
	// reads from it, before it is taken for dead. It must be positive.
	// Default: `30s`.
	PingTimeout *caddy.Duration `json:"ping_timeout,omitempty"`

	// How long a connection may go without a data frame either way. Zero: for ever.
	// Default: `0`.
	IdleTimeout *caddy.Duration `json:"idle_timeout,omitempty"`

	// How long a connection may go without its first data frame. Zero: for ever.
	// Default: `0`.
	FirstDataTimeout *caddy.Duration `json:"first_data_timeout,omitempty"`

	// How long a connection may live; shortened by up to 10 % at random. Zero:
	// for ever.
	// Default: `0`.
	MaxLifetime *caddy.Duration `json:"max_lifetime,omitempty"`

	// How long a peer's kernel may take no byte of what is written to it. Zero:
	// for ever.
	// Default: `30s`.
	WriteTimeout *caddy.Duration `json:"write_timeout,omitempty"`
}

// Resume has the settings of what happens when a backend is lost.
type Resume struct {
	// How long a client may be held without a backend before it is closed with
	// code 1013 (try again later). Zero turns holding off: losing the backend
	// then closes the client at once, with 1014.
	// Default: `30s`.
	Timeout *caddy.Duration `json:"timeout,omitempty"`

	// The bound of the random pause before the first re-dial; it doubles with
	// each further one. It must be positive.
	// Default: `100ms`.
	MinInterval *caddy.Duration `json:"min_interval,omitempty"`

	// What that bound grows to. It must not be smaller than min_interval.
	// Default: `5s`, or min_interval if that is longer.
	MaxInterval *caddy.Duration `json:"max_interval,omitempty"`

	// How many clients may re-dial one upstream at once; the others wait for
	// their turn. It must be positive.
	// Default: `64`.
	Concurrency *int `json:"concurrency,omitempty"`

	// The close codes of a backend that mean that it goes away: the client is held,
	// as when the connection breaks. Any other close frame goes to the client. An
	// empty list leaves only broken connections.
	// Default: `[1001, 1012, 1013]`.
	CloseCodes *[]uint16 `json:"close_codes,omitempty"`

	// How many backends in a row may break with the same message in hand before
	// its client is closed, with code 1011. Zero: any number.
	// Default: `3`.
	Limit *int `json:"limit,omitempty"`
}

// Replay has the settings of what the next backend gets of what the client sent.
type Replay struct {
	// What the next backend gets first: `unacked`, all that the lost one is not
	// known to have read (at least once); `unsent`, all that was never completely
	// written (at most once); `strict`, like unsent, but a client with a message in
	// doubt is closed with code 1012; `off`, nothing.
	// Default: `unacked`.
	Mode string `json:"mode,omitempty"`

	// How many bytes are kept of one connection's messages. A larger message is
	// passed on, but cannot be replayed. It must be positive.
	// Default: 5 MiB.
	Buffer *int64 `json:"buffer,omitempty"`

	// What happens when they do not fit: `pause` stops reading from the client;
	// `close` does so while there is a backend, and closes a client that is
	// held, with code 1013.
	// Default: `pause`.
	Overflow string `json:"overflow,omitempty"`
}

// Live are the groups that matter to live connections; nil is all defaults.
type Live struct {
	KeepAlive   *KeepAlive
	Resume      *Resume
	Replay      *Replay
	DrainWindow *caddy.Duration
}

// Session returns the settings of live connections, with the defaults filled in.
func (l Live) Session() (session.Settings, error) {
	k, r, p := orZero(l.KeepAlive), orZero(l.Resume), orZero(l.Replay)
	mode := replay.Unacked
	if p.Mode != "" {
		var err error
		if mode, err = replay.ParseMode(p.Mode); err != nil {
			return session.Settings{}, err
		}
	}
	shortest := DurationOr(r.MinInterval, ResumeMin)
	return session.Settings{
		PingInterval:     DurationOr(k.PingInterval, PingInterval),
		PingTimeout:      DurationOr(k.PingTimeout, PingTimeout),
		IdleTimeout:      DurationOr(k.IdleTimeout, 0),
		FirstDataTimeout: DurationOr(k.FirstDataTimeout, 0),
		MaxLifetime:      DurationOr(k.MaxLifetime, 0),
		WriteTimeout:     DurationOr(k.WriteTimeout, WriteTimeout),

		ResumeTimeout: DurationOr(r.Timeout, ResumeTimeout),
		ResumeMin:     shortest,
		ResumeMax:     DurationOr(r.MaxInterval, max(ResumeMax, shortest)),
		ResumeOn:      ValueOr(r.CloseCodes, resumeOn),
		ResumeLimit:   ValueOr(r.Limit, ResumeLimit),
		Replay:        mode,
		ReplayBuffer:  ValueOr(p.Buffer, ReplayBuffer),
		ReplayClose:   p.Overflow == "close",
		DrainWindow:   DurationOr(l.DrainWindow, DrainWindow),
	}, nil
}

// Check refuses values that mean nothing; the error names the setting.
func (l Live) Check(t *Transport) error {
	c, k, r, p := orZero(t), orZero(l.KeepAlive), orZero(l.Resume), orZero(l.Replay)
	err := first(
		positive("dial_timeout", c.DialTimeout), positive("handshake_timeout", c.HandshakeTimeout),
		notNegative("ping_interval", k.PingInterval), positive("ping_timeout", k.PingTimeout),
		notNegative("idle_timeout", k.IdleTimeout), notNegative("first_data_timeout", k.FirstDataTimeout),
		notNegative("max_lifetime", k.MaxLifetime), notNegative("write_timeout", k.WriteTimeout),
		notNegative("resume_timeout", r.Timeout),
		positive("resume_interval", r.MinInterval), positive("resume_interval", r.MaxInterval),
		notNegative("drain_window", l.DrainWindow),
		CheckCount("resume_concurrency", r.Concurrency, 1), CheckCount("resume_limit", r.Limit, 0),
		CheckSize("replay_buffer", p.Buffer),
	)
	if err != nil {
		return err
	}
	if r.MaxInterval != nil && time.Duration(*r.MaxInterval) < DurationOr(r.MinInterval, ResumeMin) {
		return fmt.Errorf("resume_interval: the longest, %s, must not be shorter than the shortest, %s",
			time.Duration(*r.MaxInterval), DurationOr(r.MinInterval, ResumeMin))
	}
	for _, code := range ValueOr(r.CloseCodes, nil) {
		if !frame.ValidCloseCode(code) {
			return fmt.Errorf("resume_on: %d is no close code that a backend can send", code)
		}
	}
	switch p.Overflow {
	case "", "pause", "close":
	default:
		return fmt.Errorf("unknown replay_overflow %q: want pause or close", p.Overflow)
	}
	_, err = l.Session() // the mode
	return err
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func positive(name string, d *caddy.Duration) error {
	if d != nil && *d <= 0 {
		return fmt.Errorf("%s must be positive: %s", name, time.Duration(*d))
	}
	return nil
}

func notNegative(name string, d *caddy.Duration) error {
	if d != nil && *d < 0 {
		return fmt.Errorf("%s must not be negative: %s", name, time.Duration(*d))
	}
	return nil
}

// CheckSize refuses a size that is not positive.
func CheckSize(name string, size *int64) error {
	if size != nil && *size <= 0 {
		return fmt.Errorf("%s must be positive: %d", name, *size)
	}
	return nil
}

// CheckCount refuses a number below least.
func CheckCount(name string, n *int, least int) error {
	if n != nil && *n < least {
		return fmt.Errorf("%s must be at least %d: %d", name, least, *n)
	}
	return nil
}

// DurationOr returns the duration, or otherwise if it is unset.
func DurationOr(d *caddy.Duration, otherwise time.Duration) time.Duration {
	return time.Duration(ValueOr(d, caddy.Duration(otherwise)))
}

// ValueOr returns the value, or otherwise if it is unset.
func ValueOr[T any](v *T, otherwise T) T {
	if v == nil {
		return otherwise
	}
	return *v
}

func orZero[T any](v *T) T {
	var zero T
	return ValueOr(v, zero)
}
