// This file holds what a tunnel asks of its route.

package tunnel

import (
	"fmt"
	"math"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// Route is what a tunnel asks of the route it belongs to. Answers follow the
// newest config. All methods may be called from any goroutine.
type Route interface {
	// Settings returns the route's settings. It does not block.
	Settings() *Settings
	// Inactive notes that no byte has passed for the time given, and that the
	// tunnel will be closed after the grace unless one does.
	Inactive(rec *registry.Conn, idle time.Duration)
}

// Settings are what a route says about its live tunnels. Zero turns a limit off.
// They are not changed once they are handed out.
type Settings struct {
	Treatment            Treatment
	InactivityTimeout    time.Duration // without a byte either way; see Treatment
	InactivityMultiplier float64       // of InactivityTimeout; Extended only
	InactivityGrace      time.Duration // from the warning to the end; up to 10 % later
	MaxLifetime          time.Duration // up to 10 % sooner; not for Immortal
	HalfOpenTimeout      time.Duration // what the other side has left after one side's end
	StuckTimeout         time.Duration // bytes of the client without one of the backend after them
	Sockets              SocketOptions // of both legs
}

// Treatment says what inactivity means for a tunnel.
type Treatment uint8

const (
	Standard Treatment = iota // closed after the inactivity timeout and the grace
	Extended                  // closed after a multiple of it, and the grace
	Immortal                  // neither inactivity nor age ends it
)

var treatmentNames = [...]string{"standard", "extended", "immortal"}

// String is the treatment's name in configs.
func (t Treatment) String() string {
	if int(t) < len(treatmentNames) {
		return treatmentNames[t]
	}
	return fmt.Sprintf("Treatment(%d)", uint8(t))
}

// ParseTreatment is the inverse of String.
func ParseTreatment(name string) (Treatment, error) {
	for t, n := range treatmentNames {
		if n == name {
			return Treatment(t), nil
		}
	}
	return 0, fmt.Errorf("unknown treatment %q", name)
}

// inactivity is how long the tunnel may go without a byte; 0: for ever. A product
// that no Duration can hold is the longest one.
func (s *Settings) inactivity() time.Duration {
	switch s.Treatment {
	case Immortal:
		return 0
	case Extended:
		d := float64(s.InactivityTimeout) * s.InactivityMultiplier
		if d >= math.MaxInt64 {
			return math.MaxInt64
		}
		return time.Duration(d)
	default:
		return s.InactivityTimeout
	}
}

// lifetime is how old the tunnel may get; 0: any age.
func (s *Settings) lifetime() time.Duration {
	if s.Treatment == Immortal {
		return 0
	}
	return s.MaxLifetime
}
