// This file reads the blocks of health_ws and health_http.

package health

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/holdfast-proxy/caddy-holdfast/internal/subdirective"
)

// UnmarshalCaddyfile sets the check up from Caddyfile tokens. Unlike a module's, it
// is called with d on the subdirective's name. Syntax:
//
//	health_ws [<uri>] {
//	    port          <port>
//	    header        <field> <value>
//	    expect_status <status...>
//	    expect_header <field> [<value>|~<regexp>]
//	}
//
// A status is a code (101), a range (200-299) or a class (2xx); several are
// alternatives. A field without a value must be there; with "" it must be absent or
// empty; else one of its values must be equal, or match after a ~. header and
// expect_header may be there several times, also for one field; all must hold.
func (c *WSCheck) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	name := d.Val()
	if err := c.unmarshalCaddyfile(d, nil); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if _, err := newWSProbe(c); err != nil {
		return d.Errf("%s: %w", name, err)
	}
	return nil
}

// UnmarshalCaddyfile sets the check up from Caddyfile tokens. Unlike a module's, it
// is called with d on the subdirective's name. Syntax:
//
//	health_http [<uri>] {
//	    port          <port>
//	    header        <field> <value>
//	    method        <method>
//	    expect_status <status...>
//	    expect_header <field> [<value>|~<regexp>]
//	    expect_body   <regexp>
//	}
//
// What is not of HTTP alone is as in health_ws.
func (c *HTTPCheck) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	name := d.Val()
	more := map[string]*string{"method": &c.Method, "expect_body": &c.ExpectBody}
	if err := c.unmarshalCaddyfile(d, more); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if _, err := newHTTPProbe(c); err != nil {
		return d.Errf("%s: %w", name, err)
	}
	return nil
}

// unmarshalCaddyfile reads arguments and block of a check that has more
// subdirectives of one argument each.
func (x *Exchange) unmarshalCaddyfile(d *caddyfile.Dispenser, more map[string]*string) error {
	args := d.RemainingArgs()
	if err := subdirective.Count(d, "URI", args, 0, 1); err != nil {
		return err
	}
	if len(args) == 1 {
		if err := (subdirective.Word{To: &x.URI}).Parse(args[0]); err != nil {
			return d.Errf("URI: %w", err)
		}
	}
	return subdirective.Each(d, []string{"header", "expect_header"}, func(name string) (bool, error) {
		if to, ok := more[name]; ok {
			return true, subdirective.One(d, subdirective.Word{To: to})
		}
		switch name {
		case "port":
			return true, subdirective.One(d, subdirective.Number{To: &x.Port})
		case "header":
			return true, x.unmarshalHeader(d)
		case "expect_status":
			x.ExpectStatus = d.RemainingArgs()
			return true, subdirective.Count(d, name, x.ExpectStatus, 1, len(x.ExpectStatus))
		case "expect_header":
			return true, x.unmarshalRule(d)
		default:
			return false, nil
		}
	})
}

func (x *Exchange) unmarshalHeader(d *caddyfile.Dispenser) error {
	name, args := d.Val(), d.RemainingArgs()
	if err := subdirective.Count(d, name, args, 2, 2); err != nil {
		return err
	}
	if x.Headers == nil {
		x.Headers = make(http.Header)
	}
	x.Headers.Add(args[0], args[1])
	return nil
}

func (x *Exchange) unmarshalRule(d *caddyfile.Dispenser) error {
	name, args := d.Val(), d.RemainingArgs()
	if err := subdirective.Count(d, name, args, 1, 2); err != nil {
		return err
	}
	rule, err := parseRule(args)
	if err != nil {
		return d.Errf("%s: %w", name, err)
	}
	x.ExpectHeaders = append(x.ExpectHeaders, rule)
	return nil
}

// parseRule reads a field's name and, if there are two arguments, its value or
// pattern.
func parseRule(args []string) (*HeaderRule, error) {
	rule := &HeaderRule{Field: args[0]}
	if len(args) == 1 {
		return rule, nil
	}
	pattern, ok := strings.CutPrefix(args[1], "~")
	if !ok {
		rule.Value = &args[1]
		return rule, nil
	}
	rule.Pattern = pattern
	_, err := compilePattern(pattern) // an empty one would mean unset
	return rule, err
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*WSCheck)(nil)
	_ caddyfile.Unmarshaler = (*HTTPCheck)(nil)
)
