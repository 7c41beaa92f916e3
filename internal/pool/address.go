// Package pool holds the upstreams of a route: which there are, which of them are
// available, and in which order a connection tries them. Both handlers use it.
//
// A Pool belongs to one config. What has to survive a reload is kept elsewhere:
// counts, failures and drains by the registry's route, the results of health checks
// by their checkers.
package pool

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// Address is where an upstream is reached.
type Address struct {
	// Name is the address as configured, or as a dynamic source gave it.
	Name string
	// Secure and Plain say whether the scheme asks for TLS or against it.
	Secure, Plain bool

	network string // tcp, tcp4, tcp6 or unix
	host    string // or path; with placeholders, all that follows the scheme
	port    string
	varies  bool // there are placeholders in it
	plain   bool // it says all: there is no port by default
}

// schemes are what a URL may begin with, and whether that means TLS.
var schemes = map[string]bool{"ws": false, "http": false, "wss": true, "https": true}

// placeholder is one in an address.
var placeholder = regexp.MustCompile(`\{[^{}]+\}`)

var errPath = errors.New("only scheme, host and port are allowed; use the rewrite or uri directive to change the path")

// ParseAddress reads an upstream's address: `host:port`, `:port` of this machine,
// `unix//path` or a URL of scheme ws, wss, http or https. There is no path in it: the
// client's goes to the backend, and rewrite and uri change it. Placeholders are resolved
// by Expand.
func ParseAddress(name string) (Address, error) {
	a := Address{Name: name}
	fail := func(err error) (Address, error) { return Address{}, fmt.Errorf("upstream %q: %w", name, err) }
	if name == "" || strings.ContainsAny(name, " \t\r\n") {
		return fail(errors.New("want an address"))
	}
	rest := name
	if scheme, after, ok := strings.Cut(name, "://"); ok && !strings.ContainsAny(scheme, "{/") {
		secure, known := schemes[scheme]
		if !known {
			return fail(fmt.Errorf("unsupported scheme %q: want ws, wss, http or https", scheme))
		}
		a.Secure, a.Plain = secure, !secure
		rest = after
	}
	if strings.ContainsAny(rest, "{}") {
		switch fixed := placeholder.ReplaceAllString(rest, ""); {
		case strings.ContainsAny(fixed, "{}"):
			return fail(errors.New("a brace without its other one"))
		case (a.Secure || a.Plain) && strings.ContainsAny(fixed, "/?#@"):
			return fail(errPath)
		}
		a.host, a.varies = rest, true
		return a, nil
	}
	if a.Secure || a.Plain {
		u, err := url.Parse(name)
		if err != nil {
			return fail(err)
		}
		if u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
			return fail(errPath)
		}
		rest = u.Host
	}
	if err := a.parse(hosted(rest, name)); err != nil {
		return fail(err)
	}
	return a, nil
}

// hosted adds the host to an address that is only a port. A placeholder without a
// value does not make one: it must not lead to this machine.
func hosted(rest, name string) string {
	if len(name) > 1 && name[0] == ':' {
		return "localhost" + rest
	}
	return rest
}

// ParsePlainAddress reads the address of an upstream that gets bytes as they come:
// `host:port`, `:port` or `unix//path`. Placeholders are resolved by Expand.
func ParsePlainAddress(name string) (Address, error) {
	fail := func(err error) (Address, error) { return Address{}, fmt.Errorf("upstream %q: %w", name, err) }
	if scheme, _, ok := strings.Cut(name, "://"); ok && !strings.ContainsAny(scheme, "{/") {
		return fail(errors.New("want host:port: bytes are passed as they come, and a URL has no say in that"))
	}
	a, err := ParseAddress(name)
	if err != nil {
		return Address{}, err
	}
	if a.plain = true; !a.varies {
		if err := a.parse(hosted(name, name)); err != nil {
			return fail(err)
		}
	}
	return a, nil
}

// parse reads what follows the scheme.
func (a *Address) parse(rest string) error {
	port := uint(80)
	switch {
	case a.Secure:
		port = 443
	case a.plain:
		port = 0
	}
	na, err := caddy.ParseNetworkAddressWithDefaults(rest, "tcp", port)
	switch {
	case err != nil:
		return err
	case na.PortRangeSize() != 1:
		return errors.New("want one port")
	case na.Network != "tcp" && na.Network != "tcp4" && na.Network != "tcp6" && na.Network != "unix":
		return fmt.Errorf("unsupported network %q: want tcp or unix", na.Network)
	case na.IsUnixNetwork() && na.Host == "":
		return errors.New("no path")
	case na.IsUnixNetwork():
		a.network, a.host, a.port = na.Network, na.Host, ""
		return nil
	case na.Host == "":
		return errors.New("no host")
	case na.StartPort == 0 && a.plain:
		return errors.New("want host:port")
	case na.StartPort == 0:
		return errors.New("port 0")
	}
	a.network, a.host, a.port = na.Network, na.Host, strconv.FormatUint(uint64(na.StartPort), 10)
	return nil
}

// Varies reports whether there are placeholders in the address, which make it a
// different one for every connection.
func (a *Address) Varies() bool { return a.varies }

// Expand returns the address that its placeholders make.
func (a *Address) Expand(replace func(string) string) (Address, error) {
	if !a.varies {
		return *a, nil
	}
	e := *a
	e.varies = false
	rest := replace(a.host)
	if err := e.parse(rest); err != nil {
		return Address{}, fmt.Errorf("upstream %q: address %q: %w", a.Name, rest, err)
	}
	return e, nil
}

// Network and Dial are what net.Dialer takes.
func (a *Address) Network() string { return a.network }

// Dial is the address without its network, "" while there are placeholders in it.
func (a *Address) Dial() string {
	switch {
	case a.varies:
		return ""
	case a.port == "":
		return a.host
	default:
		return net.JoinHostPort(a.host, a.port)
	}
}

// Port is the port, or "" for a Unix socket.
func (a *Address) Port() string { return a.port }

// WithPort returns the address with another port. Unix sockets have none.
func (a *Address) WithPort(port string) Address {
	e := *a
	if e.port != "" && port != "" {
		e.port = port
	}
	return e
}
